// One tree out of several guesses at how a text goes on: `grow` of decoding/drafters/continuations.py.
#pragma once

#include <cstdint>
#include <vector>

#include "host_trees.h"

namespace saccade {

struct GuessedNode {
  int64_t parent, token, depth;
  double confidence, path;
  uint64_t guesses;  // bit i: the i-th guess leads here
};

// Of up to 64 guesses. A Guess says what it guesses `depth` tokens further on: has(depth), token(depth), and weight(depth), the odds of it.
template <typename Guess>
class ContinuationTree {
 public:
  explicit ContinuationTree(const std::vector<Guess>& guesses) : guesses_(guesses) {}

  // The most probable nodes no deeper than `depth`, parents first.
  std::vector<GuessedNode> grow(int64_t nodes, int64_t depth) {
    std::vector<GuessedNode> made;
    branch({kNoParent, 0, 0, 1.0, 1.0, ~uint64_t{0}}, 0);
    while (!waiting_.empty() && static_cast<int64_t>(made.size()) < nodes) {
      auto best = waiting_.begin();  // the first of the most probable
      for (auto each = best; each != waiting_.end(); ++each)
        if (each->path > best->path) best = each;
      made.push_back(*best);
      waiting_.erase(best);
      if (made.back().depth < depth) branch(made.back(), made.size());
    }
    return made;
  }

 private:
  // The children of a node that stands in this column.
  void branch(const GuessedNode& node, int64_t column) {
    const size_t first = waiting_.size();
    double total = 1.0;
    for (size_t rank = 0; rank < guesses_.size(); ++rank) {
      const Guess& guess = guesses_[rank];
      if (!(node.guesses >> rank & 1) || !guess.has(node.depth)) continue;
      const int64_t token = guess.token(node.depth);
      const double weight = guess.weight(node.depth);
      size_t at = first;
      while (at < waiting_.size() && waiting_[at].token != token) ++at;
      if (at == waiting_.size()) waiting_.push_back({column, token, node.depth + 1, 0.0, 0.0, 0});
      waiting_[at].confidence += weight;
      waiting_[at].guesses |= uint64_t{1} << rank;
      total += weight;
    }
    for (size_t at = first; at < waiting_.size(); ++at) {
      waiting_[at].confidence /= total;
      waiting_[at].path = node.path * waiting_[at].confidence;
    }
  }

  const std::vector<Guess>& guesses_;
  std::vector<GuessedNode> waiting_;
};

}  // namespace saccade
