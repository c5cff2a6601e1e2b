/* A libcuda.so.1 for test_real_bindings.py: says on stderr how cuda-bindings called it, and does with
 * shared memory what the real one does with a GPU's. Structs as in cuda.h of CUDA 13.0. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef unsigned long long u64;
typedef struct { int type, id; } Location;
typedef struct { int type, handles; Location location; void *win32; unsigned char flags[8]; } Prop;
typedef struct { Location location; int flags; } Access;

enum { SLOW_US = 200000 };
static void *const CONTEXT = (void *)0x77;

#define SAY(...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr))
#define CALL(name) __attribute__((visibility("default"))) int stub_##name

static int missing(void) { SAY("a call that the stub has not"); return 801; }

CALL(cuInit)(unsigned flags) { SAY("cuInit %u", flags); return 0; }
CALL(cuDriverGetVersion)(int *version) { *version = 13000; return 0; }
CALL(cuDeviceGetCount)(int *count) { *count = 2; return 0; }
CALL(cuDeviceGet)(int *device, int ordinal) { *device = ordinal; return 0; }
CALL(cuDeviceGetName)(char *name, int length, int device)
{
    (void)device;
    snprintf(name, (size_t)length, "Stub GPU");
    return 0;
}
CALL(cuDeviceGetUuid)(unsigned char *uuid, int device)
{
    for (int at = 0; at < 16; at++) uuid[at] = (unsigned char)(at * (device + 1));
    return 0;
}
CALL(cuDeviceGetAttribute)(int *value, int attribute, int device)
{
    SAY("cuDeviceGetAttribute %d of %d", attribute, device);
    *value = 1;
    return 0;
}
CALL(cuDevicePrimaryCtxRetain)(void **context, int device)
{
    SAY("cuDevicePrimaryCtxRetain %d", device);
    *context = CONTEXT;
    return 0;
}
CALL(cuDevicePrimaryCtxRelease)(int device) { SAY("cuDevicePrimaryCtxRelease %d", device); return 0; }
CALL(cuCtxSetCurrent)(void *context) { return context == CONTEXT ? 0 : 201; }
CALL(cuMemGetInfo)(size_t *unused, size_t *total)
{
    *unused = (size_t)1 << 30;
    *total = (size_t)2 << 30;
    return 0;
}
CALL(cuMemGetAllocationGranularity)(size_t *nbytes, const Prop *prop, int option)
{
    SAY("granularity: type %d handles %d location %d %d option %d", prop->type, prop->handles,
        prop->location.type, prop->location.id, option);
    *nbytes = 2 << 20;
    return 0;
}
CALL(cuMemAddressReserve)(u64 *address, size_t nbytes, size_t alignment, u64 wanted, u64 flags)
{
    SAY("cuMemAddressReserve %zu %zu %llu %llu", nbytes, alignment, wanted, flags);
    *address = (uintptr_t)mmap(NULL, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return 0;
}
CALL(cuMemAddressFree)(u64 address, size_t nbytes)
{
    SAY("cuMemAddressFree %zu", nbytes);
    return munmap((void *)(uintptr_t)address, nbytes) ? 1 : 0;
}
CALL(cuMemCreate)(u64 *handle, size_t nbytes, const Prop *prop, u64 flags)
{
    SAY("cuMemCreate %zu: type %d handles %d location %d %d flags %llu", nbytes, prop->type,
        prop->handles, prop->location.type, prop->location.id, flags);
    if (prop->flags[1]) SAY("for RDMA");
    if (nbytes > (size_t)64 << 20) return 2;
    int fd = memfd_create("stub", 0);
    if (ftruncate(fd, (off_t)nbytes)) return 2;
    *handle = (u64)fd;
    return 0;
}
CALL(cuMemRelease)(u64 handle) { SAY("cuMemRelease"); return close((int)handle) ? 1 : 0; }
CALL(cuMemMap)(u64 address, size_t nbytes, size_t offset, u64 handle, u64 flags)
{
    SAY("cuMemMap %zu %zu %llu", nbytes, offset, flags);
    return mmap((void *)(uintptr_t)address, nbytes, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle,
                (off_t)offset) == MAP_FAILED;
}
CALL(cuMemUnmap)(u64 address, size_t nbytes)
{
    SAY("cuMemUnmap %zu", nbytes);
    return mmap((void *)(uintptr_t)address, nbytes, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED;
}
CALL(cuMemSetAccess)(u64 address, size_t nbytes, const Access *access, size_t count)
{
    SAY("cuMemSetAccess %zu: location %d %d flags %d count %zu", nbytes, access->location.type,
        access->location.id, access->flags, count);
    return mprotect((void *)(uintptr_t)address, nbytes, access->flags) ? 1 : 0;
}
CALL(cuMemExportToShareableHandle)(void *fd, u64 handle, int kind, u64 flags)
{
    SAY("cuMemExportToShareableHandle kind %d flags %llu", kind, flags);
    *(int *)fd = dup((int)handle);
    return 0;
}
CALL(cuStreamCreate)(void **stream, unsigned flags)
{
    SAY("cuStreamCreate %u", flags);
    *stream = (void *)0x5;
    return 0;
}
CALL(cuStreamDestroy)(void *stream) { SAY("cuStreamDestroy %p", stream); return 0; }
CALL(cuStreamSynchronize)(void *stream) { SAY("cuStreamSynchronize %p", stream); return 0; }
CALL(cuMemcpyHtoDAsync)(u64 target, const void *source, size_t nbytes, void *stream)
{
    SAY("cuMemcpyHtoDAsync %zu on %p", nbytes, stream);
    memcpy((void *)(uintptr_t)target, source, nbytes);
    usleep(SLOW_US);
    return 0;
}
CALL(cuMemcpyDtoH)(void *target, u64 source, size_t nbytes)
{
    SAY("cuMemcpyDtoH %zu", nbytes);
    memcpy(target, (void *)(uintptr_t)source, nbytes);
    return 0;
}
CALL(cuEventCreate)(void **event, unsigned flags)
{
    SAY("cuEventCreate %u", flags);
    *event = (void *)0x6;
    return 0;
}
CALL(cuEventRecord)(void *event, void *stream) { SAY("cuEventRecord %p %p", event, stream); return 0; }
CALL(cuEventSynchronize)(void *event)
{
    SAY("cuEventSynchronize %p", event);
    usleep(SLOW_US);
    return 0;
}
CALL(cuEventDestroy)(void *event) { SAY("cuEventDestroy %p", event); return 0; }
CALL(cuMemHostRegister)(void *address, size_t nbytes, unsigned flags)
{
    SAY("cuMemHostRegister %p %zu %u", address, nbytes, flags);
    usleep(SLOW_US);
    return nbytes == 12288 ? 712 : nbytes == 16384 ? 4242 : 0; /* the last is no code at all */
}
CALL(cuMemHostUnregister)(void *address) { SAY("cuMemHostUnregister %p", address); return 0; }

__attribute__((visibility("default"))) int
cuGetProcAddress_v2(const char *name, void **function, int version, u64 flags, int *status)
{
    (void)version, (void)flags;
    char ours[128];
    snprintf(ours, sizeof ours, "stub_%s", name);
    *function = dlsym(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD), ours);
    if (!*function) *function = (void *)missing;
    if (status) *status = 0;
    return 0;
}
