// What is kept of a step's trees: the K/V and the hidden states along each row's accepted path.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

// The accepted paths of S rows as query tokens.
struct Paths {
  Tensor dense;  // path, which need not be
  const int64_t *wanted, *first, *path;
  int64_t rows, deepest, nodes;

  // wanted [W]: query token of each node; first [S]: the roots' nodes; path [S, D]: columns of the accepted nodes, -1: none
  Paths(const Tensor& wanted_, const Tensor& first_, const Tensor& path_)
      : dense(path_.contiguous()),
        wanted(index_data<int64_t>(wanted_, "wanted")),
        first(index_data<int64_t>(first_, "first")),
        path(dense.const_data_ptr<int64_t>()),
        rows(first_.numel()),
        deepest(path_.size(1)),
        nodes(wanted_.numel()) {
    TORCH_CHECK(path_.dim() == 2 && path_.size(0) == rows, "expected first [S] and path [S, D]");
  }

  int64_t column(int64_t row, int64_t level) const { return path[row * deepest + level]; }

  int64_t token(int64_t row, int64_t column) const {
    const int64_t node = first[row] + column;
    TORCH_CHECK_INDEX(node >= 0 && node < nodes, "node ", node, " of ", nodes);
    return wanted[node];
  }
};

}  // namespace

// Moves the paths' K/V behind the chains, in order. keys, values [L, slots, heads, dim]; slots [T] of the query tokens.
// A path that is the beginning of its tree's order stays where it is.
void keep_paths(const Tensor& keys, const Tensor& values, const Tensor& slots, const Tensor& wanted, const Tensor& first,
                const Tensor& path) {
  const Paths paths(wanted, first, path);
  const int64_t* slot = index_data<int64_t>(slots, "slots");
  for (const Tensor* cache : {&keys, &values}) {
    TORCH_CHECK(cache->dim() == 4 && cache->is_contiguous(), "keep_paths: the cache must be dense [L, slots, heads, dim]");
    const int64_t bytes = cache->size(2) * cache->size(3) * cache->element_size(), layer = cache->size(1) * bytes;
    char* memory = static_cast<char*>(cache->mutable_data_ptr());
    for (int64_t row = 0; row < paths.rows; ++row)
      for (int64_t level = 0; level < paths.deepest && paths.column(row, level) > 0; ++level) {
        const int64_t column = paths.column(row, level);
        if (column == level + 1) continue;  // columns rise along a path, so what is overwritten was moved before
        const int64_t from = slot[paths.token(row, column)], to = slot[paths.token(row, level + 1)];
        TORCH_CHECK_INDEX(std::max(from, to) < cache->size(1) && std::min(from, to) >= 0, "keep_paths: no such slot");
        for (int64_t l = 0; l < cache->size(0); ++l)
          std::memcpy(memory + l * layer + to * bytes, memory + l * layer + from * bytes, bytes);
      }
  }
}

// The roots' rows of parts [T, H_i], side by side, and those of the paths below them: [S * (1 + D), sum of H_i]. Where a
// path has ended its root's stand.
Tensor gather_paths(at::TensorList parts, const Tensor& wanted, const Tensor& first, const Tensor& path) {
  TORCH_CHECK(!parts.empty(), "gather_paths: no parts");
  const Paths paths(wanted, first, path);
  std::vector<Tensor> dense;
  int64_t width = 0;
  for (const Tensor& part : parts) {
    TORCH_CHECK(part.dim() == 2 && part.scalar_type() == parts[0].scalar_type() && part.size(0) == parts[0].size(0),
                "gather_paths: parts must be [T, H], of one dtype");
    dense.push_back(part.contiguous());
    width += part.size(1);
  }
  const int64_t tail = 1 + paths.deepest, item = parts[0].element_size();
  const Tensor out = empty({paths.rows * tail, width}, parts[0].scalar_type());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t row = 0; row < paths.rows; ++row)
    for (int64_t i = 0; i < tail; ++i) {
      const int64_t token = paths.token(row, i == 0 ? 0 : std::max<int64_t>(paths.column(row, i - 1), 0));
      TORCH_CHECK_INDEX(token >= 0 && token < parts[0].size(0), "gather_paths: token ", token, " of ", parts[0].size(0));
      for (const Tensor& part : dense) {
        const int64_t bytes = part.size(1) * item;
        std::memcpy(to, static_cast<const char*>(part.const_data_ptr()) + token * bytes, bytes);
        to += bytes;
      }
    }
  return out;
}

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def(
      "keep_paths(Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor wanted, Tensor first, Tensor path) -> ()");
  m.def("gather_paths(Tensor[] parts, Tensor wanted, Tensor first, Tensor path) -> Tensor");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("keep_paths", &keep_paths);
  m.impl("gather_paths", &gather_paths);
}

}  // namespace saccade
