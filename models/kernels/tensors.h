// Checks and dispatch shared by the operators.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

namespace saccade {

// Calls body(T{}) with the element type of `dtype`.
template <typename Body>
inline void for_floating(at::ScalarType dtype, const char* op, Body body) {
  switch (dtype) {
    case at::kFloat: return body(float{});
    case at::kBFloat16: return body(c10::BFloat16{});
    case at::kHalf: return body(c10::Half{});
    case at::kDouble: return body(double{});
    default: TORCH_CHECK(false, op, ": no kernel for ", dtype);
  }
}

inline at::Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) { return at::detail::empty_cpu(shape, dtype); }

template <typename T>
inline const T* index_data(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return tensor.const_data_ptr<T>();  // checks the dtype
}

// How many threads work of that cost is worth, in units of about a nanosecond.
inline int64_t threads_for(int64_t cost) {
  constexpr int64_t kWorthAThread = 15'000;  // waking a thread that waits passively costs most of this
  if (at::in_parallel_region()) return 1;
  return std::clamp<int64_t>(cost / kWorthAThread, 1, at::get_num_threads());
}

// Runs body(begin, end) over ranges that make up [0, count): one range unless all of it, `cost`, is worth more threads.
// What a thread gets never decides what it computes, so results do not depend on the split.
template <typename Body>
inline void parallel_ranges(int64_t count, int64_t cost, const Body& body) {
  const int64_t threads = std::min(count, threads_for(cost));
  if (threads <= 1) return body(int64_t{0}, count);
  at::parallel_for(0, count, (count + threads - 1) / threads, body);
}

// Runs body(i) for i in [0, count), over threads as parallel_ranges.
template <typename Body>
inline void parallel_tasks(int64_t count, int64_t cost, const Body& body) {
  parallel_ranges(count, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace saccade
