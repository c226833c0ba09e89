// The n-gram drafter's search (decoding/drafters/ngram.py, which defines what comes out), for all rows in one call.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

constexpr int64_t kNoParent = -1;

struct Limits {
  int64_t nodes, depth, max_match, min_match, branches;
};

struct Trie {
  std::vector<int64_t> tokens, parents;
  std::vector<float> confidence;
};

struct Match {
  int64_t length, end;  // `end`: index of its last token
};

// Earlier occurrences of the text's end, the longest first and of equals the latest.
std::vector<Match> matches_of(const int64_t* text, int64_t count, const Limits& limits) {
  const int64_t last = count - 1;
  std::vector<std::vector<int64_t>> by_length(limits.max_match + 1);  // per length, the latest first
  for (int64_t end = last - 1; end >= 0; --end) {
    if (text[end] != text[last]) continue;
    int64_t length = 1;
    while (length < limits.max_match && end - length >= 0 && text[end - length] == text[last - length]) ++length;
    by_length[length].push_back(end);
    if (length == limits.max_match && static_cast<int64_t>(by_length[length].size()) == limits.branches) break;
  }
  std::vector<Match> found;
  for (int64_t length = limits.max_match; length >= std::max<int64_t>(limits.min_match, 1); --length)
    for (const int64_t end : by_length[length]) {
      if (static_cast<int64_t>(found.size()) == limits.branches) return found;
      found.push_back({length, end});
    }
  return found;
}

// Adds what followed a match; false when the trie is full.
bool add(const int64_t* text, int64_t count, const Match& match, const Limits& limits, at::ArrayRef<double> chance,
         double rival, Trie& trie) {
  int64_t column = 0;
  for (int64_t level = 0; level < limits.depth; ++level) {
    // a text that repeats itself goes on doing so
    const int64_t follows = text[match.end + 1 + level % (count - 1 - match.end)];
    int64_t child = 0, rivals = 0;
    for (size_t i = 0; i < trie.tokens.size() && !child; ++i)
      if (trie.parents[i] == column) {
        if (trie.tokens[i] == follows) child = i + 1;
        ++rivals;
      }
    if (!child) {
      if (static_cast<int64_t>(trie.tokens.size()) >= limits.nodes) return false;
      trie.tokens.push_back(follows);
      trie.parents.push_back(column);
      trie.confidence.push_back(static_cast<float>(chance[match.length + level] * std::pow(rival, rivals)));
      child = trie.tokens.size();
    }
    column = child;
  }
  return true;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> ngram_trees(at::TensorList texts, at::IntArrayRef max_nodes, at::IntArrayRef max_depth,
                                               int64_t max_match, int64_t min_match, int64_t branches,
                                               const at::ArrayRef<double> chance, double rival, int64_t bit) {
  const int64_t rows = texts.size();
  TORCH_CHECK_VALUE(int64_t(max_nodes.size()) == rows && int64_t(max_depth.size()) == rows, "a limit for each row");
  std::vector<Trie> tries(rows);
  size_t width = 1;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t count = texts[row].numel();
    const Limits limits{max_nodes[row], max_depth[row], max_match, min_match, branches};
    TORCH_CHECK_VALUE(max_match + limits.depth <= int64_t(chance.size()), "a chance is missing");
    if (limits.nodes <= 0 || count < 2) continue;
    const int64_t* text = index_data<int64_t>(texts[row], "text");
    for (const Match& match : matches_of(text, count, limits))
      if (!add(text, count, match, limits, chance, rival, tries[row])) break;
    width = std::max(width, 1 + tries[row].tokens.size());
  }
  const Tensor tokens = empty({rows, int64_t(width)}, at::kLong), parents = empty({rows, int64_t(width)}, at::kLong);
  const Tensor confidence = empty({rows, int64_t(width)}, at::kFloat), source = empty({rows, int64_t(width)}, at::kLong);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* token = tokens.mutable_data_ptr<int64_t>() + row * width;
    int64_t* parent = parents.mutable_data_ptr<int64_t>() + row * width;
    int64_t* from = source.mutable_data_ptr<int64_t>() + row * width;
    float* sure = confidence.mutable_data_ptr<float>() + row * width;
    std::fill(from, from + width, 0);
    std::fill(token, token + width, -1);
    std::fill(parent, parent + width, kNoParent);
    std::fill(sure, sure + width, 0.0f);
    token[0] = index_data<int64_t>(texts[row], "text")[texts[row].numel() - 1];
    sure[0] = 1.0f;
    const Trie& trie = tries[row];
    for (size_t i = 0; i < trie.tokens.size(); ++i) {
      token[i + 1] = trie.tokens[i];
      parent[i + 1] = trie.parents[i];
      sure[i + 1] = trie.confidence[i];
      from[i + 1] = int64_t(1) << bit;
    }
  }
  return {tokens, parents, confidence, source};
}

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def(
      "ngram_trees(Tensor[] texts, int[] max_nodes, int[] max_depth, int max_match, int min_match, int branches, "
      "float[] chance, float rival, int bit) -> (Tensor tokens, Tensor parents, Tensor confidence, Tensor source)");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("ngram_trees", &ngram_trees); }

}  // namespace saccade
