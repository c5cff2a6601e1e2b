#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tierd {
namespace {

// About 20 µs: the gap between two products of one decoder layer. Longer would take the processor
// from the caller's own next step on a machine where every core has a model process.
constexpr int kWorkerSpins = 400;
constexpr int kCallerSpins = 4000;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  // Returns false when another caller has the workers.
  bool run(uint32_t count, int threads, Task task, void* context) {
    std::unique_lock<std::mutex> mine(caller_, std::try_to_lock);
    if (!mine.owns_lock()) return false;
    grow(threads - 1);
    task_ = task;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    const uint32_t seats = static_cast<uint32_t>(std::min(threads - 1, workers_));
    state_.store(seats * kSeat, std::memory_order_release);
    bell_.fetch_add(1, std::memory_order_release);
    bell_.notify_all();
    take();
    close_and_wait();
    return true;
  }

 private:
  // state_ = free seats in the high half, workers inside the job in the low half. A worker reads
  // the job's fields only after it took a seat, and the caller does not leave while one is inside.
  static constexpr uint32_t kSeat = 1u << 16;
  static constexpr uint32_t kInside = 1u;
  static constexpr uint32_t kInsideMask = kSeat - 1;

  void take() {
    for (;;) {
      const uint32_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      task_(context_, index);
    }
  }

  void close_and_wait() {
    uint32_t state = state_.fetch_and(kInsideMask, std::memory_order_acq_rel) & kInsideMask;
    for (int spins = 0; state != 0; ++spins) {
      if (spins < kCallerSpins) {
        relax();
      } else {
        state_.wait(state, std::memory_order_acquire);
      }
      state = state_.load(std::memory_order_acquire);
    }
  }

  bool join() {
    uint32_t state = state_.load(std::memory_order_acquire);
    while (state >= kSeat) {
      if (state_.compare_exchange_weak(state, state - kSeat + kInside, std::memory_order_acq_rel)) {
        return true;
      }
    }
    return false;
  }

  void work() {
    for (;;) {
      const uint32_t bell = bell_.load(std::memory_order_acquire);
      if (join()) {
        take();
        if (state_.fetch_sub(kInside, std::memory_order_acq_rel) == kInside) state_.notify_all();
        continue;
      }
      int spins = 0;
      while (bell_.load(std::memory_order_acquire) == bell && ++spins < kWorkerSpins) relax();
      if (spins == kWorkerSpins) bell_.wait(bell, std::memory_order_acquire);
    }
  }

  void grow(int wanted) {
    if (workers_ >= wanted) return;
    // A signal must reach a thread that Python knows, never a worker.
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {
      // No more threads for this process: those that exist do the work, bit for bit the same.
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
  }

  std::mutex caller_;
  int workers_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  uint32_t count_ = 0;
  alignas(64) std::atomic<uint32_t> next_{0};
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};
};

std::atomic<Pool*> g_pool{nullptr};

std::atomic<OpenMp> g_runtime{nullptr};
std::atomic<int> g_team{1};

// The child has no worker, and its copy of the pool may be locked for ever: it is left behind. The
// runtime's threads are not there either, and it does not know.
void forget_threads_in_child() {
  g_pool.store(nullptr, std::memory_order_relaxed);
  g_runtime.store(nullptr, std::memory_order_relaxed);
}

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_threads_in_child); });
}

// Never destroyed: workers sleep in it until the process ends.
Pool& pool() {
  watch_forks();
  Pool* current = g_pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    Pool* fresh = new Pool;
    if (g_pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *current;
}

// A loop on a runtime's team. Whoever comes when all seats are taken has nothing to do.
struct Loop {
  std::atomic<int> seats;
  std::atomic<uint32_t> next;
  uint32_t count;
  Task task;
  void* context;

  static void body(void* self) {
    Loop& loop = *static_cast<Loop*>(self);
    if (loop.seats.fetch_sub(1, std::memory_order_relaxed) <= 0) return;
    for (;;) {
      const uint32_t index = loop.next.fetch_add(1, std::memory_order_relaxed);
      if (index >= loop.count) return;
      loop.task(loop.context, index);
    }
  }
};

// The team is as large as the runtime's other regions: a smaller one would end the other threads.
bool run_shared(OpenMp runtime, uint32_t count, int threads, Task task, void* context) {
  static std::mutex caller;
  std::unique_lock<std::mutex> mine(caller, std::try_to_lock);
  if (!mine.owns_lock()) return false;
  Loop loop{{threads}, {0}, count, task, context};
  const int team = std::max(threads, g_team.load(std::memory_order_relaxed));
  runtime(Loop::body, &loop, static_cast<unsigned>(team), 0);
  return true;
}

}  // namespace

void share_threads(OpenMp runtime, int team) {
  watch_forks();
  g_team.store(std::clamp(team, 1, kMaxThreads), std::memory_order_relaxed);
  g_runtime.store(runtime, std::memory_order_release);
}

void parallel_for(uint32_t count, int threads, Task task, void* context) {
  threads = static_cast<int>(
      std::min<uint32_t>(static_cast<uint32_t>(std::clamp(threads, 1, kMaxThreads)), count));
  if (threads > 1) {
    const OpenMp runtime = g_runtime.load(std::memory_order_acquire);
    if (runtime != nullptr ? run_shared(runtime, count, threads, task, context)
                           : pool().run(count, threads, task, context)) {
      return;
    }
  }
  for (uint32_t index = 0; index < count; ++index) task(context, index);
}

}  // namespace tierd
