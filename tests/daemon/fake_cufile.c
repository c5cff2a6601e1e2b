/* A libcufile.so.0 whose GPU memory is host memory. Environment variables make it misbehave:
   FAKE_VERSION (default 1150), FAKE_OPEN (code of cuFileDriverOpen), FAKE_POSIX=1 (reads count as
   POSIX), FAKE_UNCOUNTED=1 (reads are not counted), FAKE_READ (result of cuFileRead), FAKE_READ_MS
   (what a read takes), FAKE_STATS (code of cuFileStatsStart). The layout of the statistics is
   cufile.h's, written down anew. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

typedef struct { int code, cuda; } Error;
typedef struct { int type; union { int fd; void *handle; } u; void *operations; } Description;
typedef struct {
    char uuid[16];
    uint64_t read_bytes, bandwidth, utilization, duration, total, p2p, nvfs, posix, rest[21];
} Gpu;

static Gpu gpus[2];
static bool compatible[3] = {true, true, true};
static int opened, files, buffers, level;
enum { MOST = 64 };
static struct { void *base; size_t length; } pinned[MOST];

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}
static Error answer(int code) { return (Error){code, 0}; }

Error cuFileGetVersion(int *version) { *version = setting("FAKE_VERSION", 1150); return answer(0); }
Error cuFileSetParameterBool(int which, bool value) { compatible[which] = value; return answer(0); }
Error cuFileSetStatsLevel(int wanted) { level = wanted; return answer(0); }
Error cuFileDriverOpen(void) {
    int code = setting("FAKE_OPEN", 0);
    if (!code && (compatible[1] || compatible[2])) code = 5022;  /* the reader forgot to forbid it */
    opened = !code;
    return answer(code);
}
Error cuFileDriverClose_v2(void) { opened = 0; return answer(0); }
Error cuFileStatsStart(void) { return answer(setting("FAKE_STATS", level == 3 ? 0 : 5022)); }
Error cuFileGetStatsL3(void *memory) {
    size_t at = setting("FAKE_VERSION", 1150) == 1150 ? 1024 : 1136;
    uint32_t count = 2;
    memcpy((char *)memory + at, &count, sizeof count);
    memcpy((char *)memory + at + 8, gpus, sizeof gpus);
    return answer(opened ? 0 : 5001);
}
Error cuFileHandleRegister(void **handle, Description *description) {
    if (description->type != 1) return answer(5022);
    *handle = (void *)(intptr_t)(description->u.fd + 1000);
    files++;
    return answer(0);
}
void cuFileHandleDeregister(void *handle) { (void)handle; files--; }
Error cuFileBufRegister(void *base, size_t length, int flags) {
    (void)flags;
    if ((uintptr_t)base % 65536 || length % 65536) return answer(5036);  /* pages of a GPU */
    for (int at = 0; at < MOST; at++)
        if (!pinned[at].base) {
            pinned[at].base = base;
            pinned[at].length = length;
            buffers++;
            return answer(0);
        }
    return answer(5036);
}
static size_t length_of(void *base) {
    for (int at = 0; at < MOST; at++)
        if (pinned[at].base == base) return pinned[at].length;
    return 0;
}
Error cuFileBufDeregister(void *base) {
    for (int at = 0; at < MOST; at++)
        if (pinned[at].base == base) {
            pinned[at].base = NULL;
            buffers--;
            return answer(0);
        }
    return answer(5022);
}
ssize_t cuFileRead(void *handle, void *base, size_t size, off_t offset, off_t at) {
    int forced = setting("FAKE_READ", 1);
    if (forced != 1) return forced;
    usleep((useconds_t)setting("FAKE_READ_MS", 0) * 1000);
    if ((size_t)at + size > length_of(base)) return -5036;  /* the real one would not go direct */
    if (size > 4096) size = size / 2 / 4096 * 4096 + 4096;  /* a short read is legal */
    ssize_t got = pread((int)(intptr_t)handle - 1000, (char *)base + at, size, offset);
    if (got > 0 && !setting("FAKE_UNCOUNTED", 0)) {
        Gpu *gpu = &gpus[1];
        gpu->read_bytes += got;
        gpu->total++;
        if (setting("FAKE_POSIX", 0)) gpu->posix++; else gpu->nvfs++;
    }
    return got;
}
int fake_files(void) { return files; }
int fake_buffers(void) { return buffers; }
int fake_opened(void) { return opened; }
