// Threads that go through a list of operations together.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace saccade {

// What the threads of a team share. They meet after each operation, and spin until all are there: waking sleeping ones
// takes longer than most operations do.
class Team {
 public:
  int64_t next() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // Returns when `size` threads have called it.
  void meet(int64_t size) {
    if (size == 1) return next_.store(0, std::memory_order_relaxed);
    const int64_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      if (spins > kSpins) std::this_thread::yield();  // the other may wait for this core
    }
  }

 private:
  static constexpr int64_t kSpins = 4096;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> turn_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

// One thread's part.
class Worker {
 public:
  Worker(Team& team, int64_t rank, int64_t size) : team_(team), rank_(rank), size_(size) {}

  // Calls body(begin, end) with this thread's share of [0, count); returns when all threads have done theirs.
  template <typename Body>
  void share(int64_t count, const Body& body) {
    const int64_t begin = count * rank_ / size_, end = count * (rank_ + 1) / size_;
    if (begin < end) body(begin, end);
    team_.meet(size_);
  }

  // The same with body(i), for tasks that differ in length: each goes to the thread that is free first.
  template <typename Body>
  void take(int64_t count, const Body& body) {
    for (int64_t i = team_.next(); i < count; i = team_.next()) body(i);
    team_.meet(size_);
  }

 private:
  Team& team_;
  const int64_t rank_, size_;
};

}  // namespace saccade
