// A small persistent pool of threads that share the indices of a loop.
#pragma once

#include <cstdint>

namespace tierd {

constexpr int kMaxThreads = 128;

using Task = void (*)(void* context, uint32_t index);

// Calls task(context, i) for every i in [0, count) on the caller and up to threads - 1 workers, and
// returns when all calls have returned. Which thread takes which index is left open.
//
// The caller works too and never waits for a worker to wake, so a job costs at most what it costs
// alone. A second caller while the workers are taken does its job alone: two Python threads never
// put more threads on the machine than one was allowed. After fork() the child makes its own.
void parallel_for(uint32_t count, int threads, Task task, void* context);

// libgomp's GOMP_parallel, which other OpenMP runtimes have too: calls body(context) on a team of
// `threads`, the caller among them, and returns when all calls have returned.
using OpenMp = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

// From now on loops run on a team of this runtime instead of our workers; null: on ours again, as
// in a child after fork(). Of a team of at least `team` no more than parallel_for's `threads` work.
//
// After a parallel region the runtime's threads keep their processors for milliseconds, to be at
// hand for the next one. Workers of our own would share the processors with them.
void share_threads(OpenMp runtime, int team);

}  // namespace tierd
