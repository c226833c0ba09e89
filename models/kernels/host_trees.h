// What searches on the host return: the four arrays of `Trees` (models/tree.py), from the nodes that they list row by row.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace saccade {

constexpr int64_t kNoParent = -1;  // of the root and of padding

using TreeArrays = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // tokens, parents, confidence, source

inline int64_t last_token(const at::Tensor& text) { return index_data<int64_t>(text, "text")[text.numel() - 1]; }

// [R, 1 + the most nodes of a row]. A node has a `token`, a `confidence` and a `parent`, the column of a node that stands
// before it; the first node of a row gets column 1, behind the root.
template <typename Node, typename RootOf, typename SourceOf>
TreeArrays tree_arrays(const std::vector<std::vector<Node>>& drafted, const RootOf& root_of, const SourceOf& source_of) {
  size_t most = 0;
  for (const std::vector<Node>& nodes : drafted) most = std::max(most, nodes.size());
  const int64_t rows = drafted.size(), width = 1 + most;
  const std::array<int64_t, 2> shape{rows, width};
  const at::Tensor tokens = empty(shape, at::kLong), parents = empty(shape, at::kLong), source = empty(shape, at::kLong);
  const at::Tensor confidence = empty(shape, at::kFloat);
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  int64_t* parent = parents.mutable_data_ptr<int64_t>();
  int64_t* from = source.mutable_data_ptr<int64_t>();
  float* sure = confidence.mutable_data_ptr<float>();
  const auto put = [&](int64_t of_token, int64_t of_parent, double of_confidence, int64_t of_source) {
    *token++ = of_token;
    *parent++ = of_parent;
    *sure++ = static_cast<float>(of_confidence);
    *from++ = of_source;
  };
  for (int64_t row = 0; row < rows; ++row) {
    put(root_of(row), kNoParent, 1.0, 0);
    for (const Node& node : drafted[row]) put(node.token, node.parent, node.confidence, source_of(node));
    for (int64_t column = 1 + drafted[row].size(); column < width; ++column) put(-1, kNoParent, 0.0, 0);
  }
  return {tokens, parents, confidence, source};
}

// Of rows that have these texts, all nodes being guesses of drafter number `bit`.
template <typename Node>
TreeArrays guessed_trees(const std::vector<std::vector<Node>>& drafted, at::TensorList texts, int64_t bit) {
  return tree_arrays(
      drafted, [&](int64_t row) { return last_token(texts[row]); }, [&](const Node&) { return int64_t{1} << bit; });
}

}  // namespace saccade
