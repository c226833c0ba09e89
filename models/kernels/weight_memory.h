// Memory for packed weights.
#pragma once

#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vec.h"

namespace saccade {

// An uninitialised tensor of so many elements. As much of it as fills huge pages asks for them: weights are read from
// end to end in every step, and small pages stop the hardware's prefetching at every fourth kilobyte.
inline at::Tensor empty_weights(int64_t count, at::ScalarType dtype) {
  constexpr int64_t kHugePage = 2 << 20;
  const int64_t bytes = std::max<int64_t>(count * static_cast<int64_t>(c10::elementSize(dtype)), 1);
  const int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
  void* data = std::aligned_alloc(alignment, ceil_div(bytes, alignment) * alignment);
  if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // may be refused, and is then no loss but of speed; a rest that would not fill a page takes no more than it needs
  if (bytes >= kHugePage) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return at::from_blob(data, {count}, [](void* memory) { std::free(memory); }, at::TensorOptions(dtype));
}

}  // namespace saccade
