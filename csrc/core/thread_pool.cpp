#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/errors.h"

namespace regkernels {

namespace {

// One parallel loop. The caller and the workers that help share it, and each takes the next piece.
struct Loop {
  void (*body)(void*, int64_t, int64_t);
  void* state;
  int64_t count;
  int64_t piece;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> unfinished;  // pieces
  std::mutex mutex;
  std::condition_variable finished;

  bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }

  void help() {
    for (;;) {
      const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= count) return;
      body(state, begin, std::min(begin + piece, count));
      if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return unfinished.load(std::memory_order_acquire) == 0; });
  }
};

class ThreadPool {
 public:
  void run(const std::shared_ptr<Loop>& loop) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_workers();
      loops_.push_back(loop);
    }
    available_.notify_all();
    loop->help();
    loop->wait();
    std::lock_guard<std::mutex> lock(mutex_);
    loops_.erase(std::remove(loops_.begin(), loops_.end(), loop), loops_.end());
  }

 private:
  void start_workers() {
    while (workers_ + 1 < num_threads()) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: the caller does the work
      }
      ++workers_;
    }
  }

  void work() {
    // Without this the floating-point environment would be that of the thread which happened to
    // start this one; see launch.
    std::fesetenv(FE_DFL_ENV);
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      std::shared_ptr<Loop> loop;
      for (const auto& candidate : loops_) {
        if (!candidate->exhausted()) {
          loop = candidate;
          break;
        }
      }
      if (loop) {
        lock.unlock();
        loop->help();
        loop.reset();
        lock.lock();
      } else {
        available_.wait(lock);
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable available_;
  std::deque<std::shared_ptr<Loop>> loops_;
  int workers_ = 0;
};

// The pool is never destroyed: detached workers may still be waiting on it when the process ends.
std::atomic<ThreadPool*> g_pool{nullptr};

ThreadPool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new ThreadPool;
    // A forked child has none of the workers and a mutex in an unknown state: it gets a new pool.
    pthread_atfork(nullptr, nullptr, [] { g_pool = new ThreadPool; });
  });
  return *g_pool.load();
}

int read_num_threads() {
  if (const char* text = std::getenv("REGKERNELS_NUM_THREADS")) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || value < 1 || value > 1024) {
      throw ValueError(
          concat("REGKERNELS_NUM_THREADS: expected a number from 1 to 1024, got ", text));
    }
    return static_cast<int>(value);
  }
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

int num_threads() {
  static const int value = read_num_threads();
  return value;
}

void detail::parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                          void* state) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int threads = num_threads();
  if (threads == 1 || count <= grain) return body(state, 0, count);
  // A few pieces per thread even out unequal work.
  const int64_t piece = std::max(grain, (count + 4 * threads - 1) / (4 * threads));
  auto loop = std::make_shared<Loop>();
  loop->body = body;
  loop->state = state;
  loop->count = count;
  loop->piece = piece;
  loop->unfinished = (count + piece - 1) / piece;
  pool().run(loop);
}

}  // namespace regkernels
