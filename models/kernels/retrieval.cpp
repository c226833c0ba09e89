// The retrieval drafter's search (decoding/drafters/retrieval.py and decoding/datastore/layout.py, which define what
// comes out), for all rows in one call. The datastore's arrays are mapped from a file: each element that is looked at
// may cost a read from the disk, the first time, and a miss of all caches later. So few are looked at, and those whose
// places are known beforehand are fetched together.
//
// Compiled with -ffp-contract=off: the definition rounds each product, so this must, too.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "host_trees.h"
#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

constexpr int64_t kNoToken = -1;
constexpr int64_t kSearchCost = 15'000;  // about the nanoseconds of one

struct Limits {
  int64_t nodes, depth, max_match, min_match, max_matches, backoff;
};

struct Range {
  int64_t first, end;  // numbers of suffixes
};

struct Match {
  int64_t length;
  Range range;
};

// Ids from `ids` on stand for the end: the separator of documents, and what the target does not know. A file may be
// damaged, so that nothing in it is trusted to be an index.
template <typename Token, typename Place>
struct Store {
  const Token* tokens;
  const Place* suffixes;
  const int64_t* starts;
  int64_t count, ids;

  int64_t token(int64_t place) const {
    if (place < 0 || place >= count) return kNoToken;
    return static_cast<int64_t>(tokens[place]);
  }
  int64_t token_after(int64_t number, int64_t ahead) const {
    return token(static_cast<int64_t>(suffixes[number]) + ahead);
  }

  Range starting_with(int64_t id) const {
    return {std::clamp<int64_t>(starts[id], 0, count), std::clamp<int64_t>(starts[id + 1], 0, count)};
  }

  // Those of a range whose token number `ahead` is `wanted`; they agree in all tokens before it, so they are in order.
  Range narrowed(Range range, int64_t ahead, int64_t wanted) const {
    int64_t low = range.first, high = range.end;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (token_after(middle, ahead) < wanted) low = middle + 1;
      else high = middle;
    }
    // mostly few are left: their end is near, so strides that double find it sooner than halves of the range
    const int64_t first = low;
    int64_t stride = 1;
    while (low + stride <= range.end && token_after(low + stride - 1, ahead) == wanted) {
      low += stride;
      stride *= 2;
    }
    high = std::min(range.end, low + stride - 1);
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (token_after(middle, ahead) == wanted) low = middle + 1;
      else high = middle;
    }
    return {first, low};
  }

  Range find(const int64_t* pattern, int64_t length) const {
    Range range = starting_with(pattern[0]);
    for (int64_t ahead = 1; ahead < length && range.first < range.end; ++ahead)
      range = narrowed(range, ahead, pattern[ahead]);
    return range;
  }

  Match longest(const int64_t* text, int64_t size, const Limits& limits) const {
    const int64_t most = std::min(limits.max_match, size);
    int64_t high = 0;
    while (high < most && text[size - 1 - high] >= 0 && text[size - 1 - high] < ids) ++high;
    int64_t low = limits.min_match;
    Match best{0, {0, 0}};
    while (low <= high) {
      const int64_t length = (low + high) / 2;
      const Range range = find(text + size - length, length);
      if (range.first < range.end) {
        best = {length, range};
        low = length + 1;
      } else {
        high = length - 1;
      }
    }
    return best;
  }
};

struct Node {
  int64_t parent, token;
  double confidence;
};

constexpr int kMostMatches = 4;  // the longest, and shorter ones

// Occurrences of a match: the places after them, in the order of what follows.
struct Level {
  int64_t length;
  std::vector<int64_t> places;
};

// Those of a level's occurrences that pass through a node. What follows is sorted, so they are in a row.
struct Span {
  int64_t first, end;
};

using Spans = std::array<Span, kMostMatches>;

// A node that may be taken.
struct Candidate {
  double path, chance;
  int64_t number;  // in the order of discovery
  int64_t parent, token, depth;
  Spans through;

  bool operator<(const Candidate& other) const {
    return path < other.path || (path == other.path && number > other.number);
  }
};

// Places after `max_matches` of the occurrences at most, evenly over all of them.
template <typename S>
Level level_of(const S& store, const Match& match, int64_t max_matches) {
  const int64_t found = std::max<int64_t>(0, match.range.end - match.range.first), taken = std::min(found, max_matches);
  Level level{match.length, std::vector<int64_t>(taken)};
  for (int64_t i = 0; i < taken; ++i) {
    const int64_t place = static_cast<int64_t>(store.suffixes[match.range.first + i * found / taken]) + match.length;
    if (place >= 0 && place < store.count) __builtin_prefetch(store.tokens + place);
    level.places[i] = place;
  }
  return level;
}

// The longest match, then shorter ones, by halves, until there are enough occurrences.
template <typename S>
std::vector<Level> levels_of(const S& store, const int64_t* text, int64_t size, const Limits& limits) {
  std::vector<Level> levels;
  Match match = store.longest(text, size, limits);
  while (match.length > 0) {
    levels.push_back(level_of(store, match, limits.max_matches));
    const int64_t length = std::max(limits.min_match, (match.length + 1) / 2);
    const bool enough = match.range.end - match.range.first >= limits.max_matches;
    if (enough || length == match.length || static_cast<int64_t>(levels.size()) > limits.backoff) break;
    match = {length, store.find(text + size - length, length)};
  }
  return levels;
}

// Goes through a span, from one token that follows to the next.
template <typename S>
class Cursor {
 public:
  static constexpr int64_t kDone = std::numeric_limits<int64_t>::max();

  Cursor(const S& store, const Level& level, Span span, int64_t ahead)
      : store_(store), places_(level.places), ahead_(ahead), end_(span.end), run_{span.first, span.first} {
    advance();
  }

  int64_t token() const { return token_; }
  Span run() const { return run_; }  // the occurrences that go on with it

  void advance() {
    const int64_t before = token_;
    do {
      run_.first = run_.end;
      token_ = run_.first < end_ ? next(run_.first) : kDone;
      while (run_.end < end_ && next(run_.end) == token_) ++run_.end;
    } while (token_ == kNoToken);
    if (token_ <= before || token_ >= store_.ids) token_ = kDone;  // a damaged file is out of order; or documents end
  }

 private:
  int64_t next(int64_t i) const { return store_.token(places_[i] + ahead_); }

  const S& store_;
  const std::vector<int64_t>& places_;
  const int64_t ahead_, end_;
  Span run_;
  int64_t token_ = kNoToken;
};

template <typename S>
class Growth {
 public:
  Growth(const S& store, const std::vector<Level>& levels, at::ArrayRef<double> doubt, double least)
      : store_(store), levels_(levels), doubt_(doubt), least_(least) {}

  void grow(const Limits& limits, std::vector<Node>& trie) {
    Spans all{};
    for (size_t k = 0; k < levels_.size(); ++k) all[k] = {0, static_cast<int64_t>(levels_[k].places.size())};
    discover(all, 0, 0, 1.0);
    while (!waiting_.empty() && static_cast<int64_t>(trie.size()) < limits.nodes) {
      std::pop_heap(waiting_.begin(), waiting_.end());
      const Candidate taken = waiting_.back();
      waiting_.pop_back();
      trie.push_back({taken.parent, taken.token, taken.chance});
      if (taken.depth < limits.depth) discover(taken.through, trie.size(), taken.depth, taken.path);
    }
  }

 private:
  // Lets the children of a node wait.
  void discover(const Spans& spans, int64_t column, int64_t depth, double path) {
    std::vector<Cursor<S>> cursors;
    cursors.reserve(levels_.size());
    for (size_t k = 0; k < levels_.size(); ++k) cursors.emplace_back(store_, levels_[k], spans[k], depth);
    for (;;) {
      int64_t token = Cursor<S>::kDone;
      for (const auto& cursor : cursors) token = std::min(token, cursor.token());
      if (token == Cursor<S>::kDone) return;
      Spans through{};
      double chance = 0.0;
      for (size_t k = levels_.size(); k-- > 0;) {  // the doubt about a match goes by the next shorter one
        if (cursors[k].token() == token) {
          through[k] = cursors[k].run();
          cursors[k].advance();
        }
        const double doubt = doubt_[levels_[k].length + depth];
        const double all = static_cast<double>(spans[k].end - spans[k].first);
        chance = (static_cast<double>(through[k].end - through[k].first) + doubt * chance) / (all + doubt);
      }
      if (path * chance < least_) continue;
      waiting_.push_back({path * chance, chance, discovered_++, column, token, depth + 1, through});
      std::push_heap(waiting_.begin(), waiting_.end());
    }
  }

  const S& store_;
  const std::vector<Level>& levels_;
  const at::ArrayRef<double> doubt_;
  const double least_;
  int64_t discovered_ = 0;
  std::vector<Candidate> waiting_;  // a heap
};

template <typename Token, typename Place>
Store<Token, Place> store_of(at::TensorList arrays, int64_t ids) {
  const Tensor &tokens = arrays[0], &suffixes = arrays[1], &starts = arrays[2];
  TORCH_CHECK_VALUE(tokens.is_contiguous() && suffixes.is_contiguous(), "a datastore's arrays must be contiguous");
  TORCH_CHECK_VALUE(tokens.numel() == suffixes.numel(), "a suffix for each token");
  TORCH_CHECK_VALUE(0 <= ids && ids < starts.numel() - 1, "ids up to the separator's");
  return {static_cast<const Token*>(tokens.const_data_ptr()), static_cast<const Place*>(suffixes.const_data_ptr()),
          index_data<int64_t>(starts, "starts"), tokens.numel(), ids};
}

// Calls body(store) with the store of the arrays' types.
template <typename Body>
void with_store(at::TensorList arrays, int64_t ids, const Body& body) {
  TORCH_CHECK_VALUE(arrays.size() == 3, "tokens, suffixes and starts");
  const auto tokens = arrays[0].scalar_type(), places = arrays[1].scalar_type();
  const bool small = tokens == at::ScalarType::UInt16, near = places == at::ScalarType::Int;
  TORCH_CHECK_VALUE(small || tokens == at::ScalarType::UInt32, "tokens must be uint16 or uint32");
  TORCH_CHECK_VALUE(near || places == at::ScalarType::Long, "suffixes must be int32 or int64");
  if (small && near) body(store_of<uint16_t, int32_t>(arrays, ids));
  else if (small) body(store_of<uint16_t, int64_t>(arrays, ids));
  else if (near) body(store_of<uint32_t, int32_t>(arrays, ids));
  else body(store_of<uint32_t, int64_t>(arrays, ids));
}

}  // namespace

TreeArrays retrieval_trees(at::TensorList arrays, at::TensorList texts, at::IntArrayRef max_nodes, at::IntArrayRef max_depth,
                           int64_t ids, int64_t max_match, int64_t min_match, int64_t max_matches, int64_t backoff,
                           const at::ArrayRef<double> doubt, double least, int64_t bit) {
  const int64_t rows = texts.size();
  TORCH_CHECK_VALUE(0 <= backoff && backoff < kMostMatches, "backoff from 0 to ", kMostMatches - 1);
  TORCH_CHECK_VALUE(int64_t(max_nodes.size()) == rows && int64_t(max_depth.size()) == rows, "a limit for each row");
  std::vector<std::vector<Node>> tries(rows);
  for (const int64_t depth : max_depth)
    TORCH_CHECK_VALUE(max_match + depth <= int64_t(doubt.size()), "a doubt is missing");
  with_store(arrays, ids, [&](const auto& store) {
    parallel_tasks(rows, rows * kSearchCost, [&](int64_t row) {
      const Limits limits{max_nodes[row], max_depth[row], max_match, min_match, max_matches, backoff};
      if (limits.nodes <= 0 || limits.depth <= 0) return;
      const int64_t* text = index_data<int64_t>(texts[row], "text");
      const std::vector<Level> levels = levels_of(store, text, texts[row].numel(), limits);
      Growth growth(store, levels, doubt, least);
      growth.grow(limits, tries[row]);
    });
  });
  return guessed_trees(tries, texts, bit);
}

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def(
      "retrieval_trees(Tensor[] store, Tensor[] texts, int[] max_nodes, int[] max_depth, int ids, int max_match, "
      "int min_match, int max_matches, int backoff, float[] doubt, float least, int bit) -> "
      "(Tensor tokens, Tensor parents, Tensor confidence, Tensor source)");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("retrieval_trees", &retrieval_trees); }

}  // namespace saccade
