// The n-gram drafter's search (decoding/drafters/ngram.py, which defines what comes out), for all rows in one call.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "continuation_tree.h"
#include "host_trees.h"
#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

constexpr int64_t kLongest = 64;    // LONGEST in ngram.py
constexpr int64_t kMostLevels = 7;  // 1, 2, 4 .. 64

// The lengths of n-grams that are indexed: the shortest, doubled as often as the longest allows.
struct Levels {
  std::array<int64_t, kMostLevels> length{};
  int64_t count = 0, longest;

  Levels(int64_t min_match, int64_t max_match) : longest(max_match) {
    for (int64_t each = min_match; each <= max_match; each *= 2) length[count++] = each;
  }
};

struct Match {
  int64_t end, length;  // `end`: index of its last token
};

// Where each n-gram of a text ended last, and before that. All of it lies in one int32 tensor of zeros that a new text
// begins with: how many tokens are in it; [capacity, levels] the end before this one of the same n-gram; [levels, 2 *
// capacity] hash tables of the latest ones. Ends count from 1; 0 is none. A slot's n-gram is read from the text itself.
class Index {
 public:
  Index(const Tensor& store, const int64_t* text, const Levels& levels)
      : text_(text), levels_(levels), capacity_((store.numel() - 1) / (3 * levels.count)) {
    TORCH_CHECK_VALUE(store.numel() > 3 * levels.count && store.is_contiguous(), "an index has no room");
    done_ = store.mutable_data_ptr<int32_t>();  // checks the dtype
    before_ = done_ + 1;
    latest_ = before_ + capacity_ * levels.count;
  }

  // Takes in the n-grams that end at one of the first `ends` tokens.
  void extend(int64_t ends) {
    TORCH_CHECK_VALUE(ends <= capacity_, "an index has no room for ", ends, " tokens");
    TORCH_CHECK_VALUE(*done_ <= ends, "an index of ", *done_, " n-grams is not of a text of ", ends + 1, " tokens");
    std::array<uint64_t, kMostLevels> hash;
    for (int64_t end = *done_; end < ends; ++end) {
      const int64_t known = hashes(end, hash);
      for (int64_t level = 0; level < known; ++level) {
        int32_t& slot = latest(level, hash[level], end);
        before_[end * levels_.count + level] = slot;
        slot = static_cast<int32_t>(end + 1);
      }
    }
    *done_ = static_cast<int32_t>(std::max<int64_t>(*done_, ends));
  }

  // The best `most` matches with the text up to `last`, the longest first and of equals the latest.
  std::vector<Match> matches(int64_t last, int64_t most) {
    std::array<uint64_t, kMostLevels> hash;
    std::array<int32_t, kMostLevels> newest{};
    const int64_t known = hashes(last, hash);
    int64_t top = 0;  // what has occurred has occurred at all shorter lengths, too
    while (top < known && (newest[top] = latest(top, hash[top], last)) != 0) ++top;
    std::vector<Match> found;
    while (--top >= 0 && static_cast<int64_t>(found.size()) < most) {
      int32_t at = newest[top];
      for (int64_t visited = 0; visited < most && at != 0; ++visited) {
        const int64_t end = at - 1;
        const bool fresh = std::none_of(found.begin(), found.end(), [&](const Match& each) { return each.end == end; });
        if (fresh) found.push_back({end, length(end, last, levels_.length[top])});
        at = before_[end * levels_.count + top];
      }
    }
    std::sort(found.begin(), found.end(), [](const Match& one, const Match& other) {
      return one.length != other.length ? one.length > other.length : one.end > other.end;
    });
    if (static_cast<int64_t>(found.size()) > most) found.resize(most);
    return found;
  }

 private:
  // The hashes of the n-grams that end at `end`; how many fit in the text.
  int64_t hashes(int64_t end, std::array<uint64_t, kMostLevels>& out) const {
    uint64_t hash = 0;
    int64_t level = 0;
    for (int64_t back = 0; level < levels_.count && back <= end; ++back) {
      hash = (hash ^ (hash >> 29)) + static_cast<uint64_t>(text_[end - back]) + 1;
      hash *= 0x9E3779B97F4A7C15ull;
      if (back + 1 == levels_.length[level]) out[level++] = hash;
    }
    return level;
  }

  // The slot of the n-gram that ends at `end`: 0 if it has not been seen. Half of the slots stay free.
  int32_t& latest(int64_t level, uint64_t hash, int64_t end) {
    const uint64_t size = 2 * capacity_;
    int32_t* table = latest_ + level * size;
    uint64_t at = ((hash >> 32) * size) >> 32;
    while (table[at] != 0 && !same(table[at] - 1, end, levels_.length[level])) at = at + 1 == size ? 0 : at + 1;
    return table[at];
  }

  bool same(int64_t one, int64_t other, int64_t length) const {
    for (int64_t back = 0; back < length; ++back)
      if (text_[one - back] != text_[other - back]) return false;
    return true;
  }

  int64_t length(int64_t end, int64_t last, int64_t known) const {
    while (known < levels_.longest && known <= end && text_[end - known] == text_[last - known]) ++known;
    return known;
  }

  const int64_t* text_;
  const Levels& levels_;
  int64_t capacity_;
  int32_t *done_, *before_, *latest_;
};

// What followed an occurrence, as long as it takes: a text that repeats itself goes on doing so.
struct Continuation {
  const int64_t* follows;  // the token after the occurrence
  int64_t count;           // tokens from there to the text's end
  const double* weights;   // odds of the token so much further on

  bool has(int64_t) const { return true; }
  int64_t token(int64_t depth) const { return follows[depth % count]; }
  double weight(int64_t depth) const { return weights[depth]; }
};

}  // namespace

TreeArrays ngram_trees(at::TensorList texts, at::TensorList indexes, at::IntArrayRef max_nodes, at::IntArrayRef max_depth,
                       int64_t max_match, int64_t min_match, const Tensor& weights, int64_t bit) {
  const int64_t rows = texts.size();
  TORCH_CHECK_VALUE(int64_t(indexes.size()) == rows && int64_t(max_nodes.size()) == rows && int64_t(max_depth.size()) == rows,
                    "an index and limits for each row");
  TORCH_CHECK_VALUE(1 <= min_match && min_match <= max_match && max_match <= kLongest && weights.dim() == 2 &&
                        weights.size(0) <= kLongest && weights.is_contiguous(),
                    "no such matches");
  const Levels levels(min_match, max_match);
  const int64_t most = weights.size(0), stride = weights.size(1);
  const double* table = weights.const_data_ptr<double>();
  std::vector<std::vector<GuessedNode>> trees(rows);
  std::vector<Continuation> guesses;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t count = texts[row].numel();
    TORCH_CHECK_VALUE(count >= 1 && max_match + max_depth[row] <= stride, "a text or a weight is missing");
    if (max_nodes[row] <= 0 || max_depth[row] <= 0 || count < 2) continue;
    const int64_t* text = index_data<int64_t>(texts[row], "text");
    Index index(indexes[row], text, levels);
    index.extend(count - 1);  // what ends at the last token has no continuation yet
    guesses.clear();
    for (const Match& match : index.matches(count - 1, most)) {
      const double* odds = table + static_cast<int64_t>(guesses.size()) * stride + match.length;
      guesses.push_back({text + match.end + 1, count - 1 - match.end, odds});
    }
    trees[row] = ContinuationTree<Continuation>(guesses).grow(max_nodes[row], max_depth[row]);
  }
  return guessed_trees(trees, texts, bit);
}

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def(
      "ngram_trees(Tensor[] texts, Tensor(a!)[] indexes, int[] max_nodes, int[] max_depth, int max_match, int min_match, "
      "Tensor weights, int bit) -> (Tensor tokens, Tensor parents, Tensor confidence, Tensor source)");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("ngram_trees", &ngram_trees); }

}  // namespace saccade
