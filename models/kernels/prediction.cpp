// Where outputs are in their predictions, and what is drafted from there (decoding/drafters/alignment.py, which defines
// what comes out), for all rows in one call.
//
// Compiled with -ffp-contract=off: odds must have the bits that the definition gives them, or near ties would differ.
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "continuation_tree.h"
#include "host_trees.h"
#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

constexpr int64_t kMaxTree = 64;
constexpr int64_t kFarMatch = 4;  // FAR_MATCH in alignment.py

struct Rules {
  int64_t max_match, branches, trusted, long_edit, before, after;
  double changed, inserted, short_edit, reach, found;
  std::vector<double> odds;  // of the next token after a match of so many
};

// Where an output may be in its prediction.
struct Place {
  int64_t index, match;
  double factor, odds;
};

// The predicted tokens from a place on.
struct Continuation {
  const int32_t* follows;
  int64_t count;
  const double* weights;
  double factor;

  bool has(int64_t depth) const { return depth < count; }
  int64_t token(int64_t depth) const { return follows[depth]; }
  double weight(int64_t depth) const { return factor * weights[depth]; }
};

class Alignment {
 public:
  Alignment(const Rules& rules, const int64_t* prediction, int64_t count, int64_t seen)
      : rules_(rules), tokens_(prediction, prediction + count), run_(rules.trusted), seen_(seen), ends_(count) {
    std::iota(ends_.begin(), ends_.end(), 0);
    far_.assign(ends_.begin() + std::min(count, kFarMatch - 1), ends_.end());
    std::stable_sort(ends_.begin(), ends_.end(), [&](int32_t a, int32_t b) { return tokens_[a] < tokens_[b]; });
    std::stable_sort(far_.begin(), far_.end(), [&](int32_t a, int32_t b) { return last_before(a) < last_before(b); });
  }

  // Takes in what is new of a text.
  void follow(const int64_t* text, int64_t count) {
    for (; seen_ < count; ++seen_) {
      if (lost_ == 0 && index_ < size() && tokens_[index_] == text[seen_]) {
        ++index_;
        ++run_;
      } else {
        ++lost_;
        run_ = 0;
      }
    }
  }

  // The likeliest places first; once one is certain, the place is known.
  std::vector<Place> places(const int64_t* text, int64_t count) {
    if (lost_ == 0) return {place(index_, std::min(run_, kMaxTree), 1.0)};
    const int64_t tail = std::min(rules_.max_match, count);
    std::vector<Place> ranked = matches(text + count - 1, tail);
    if (lost_ <= rules_.long_edit) {
      const double fading = rules_.short_edit / (rules_.short_edit - 1 + static_cast<double>(lost_));
      for (const Place& edit : {place(index_ + lost_, 1, rules_.changed * fading), place(index_, 1, rules_.inserted * fading)}) {
        const auto same = [&](const Place& other) { return other.index == edit.index; };
        if (std::none_of(ranked.begin(), ranked.end(), same)) ranked.push_back(edit);
      }
    }
    std::stable_sort(ranked.begin(), ranked.end(), likelier);
    const double best = ranked.empty() ? 0.0 : ranked[0].odds, second = ranked.size() > 1 ? ranked[1].odds : 0.0;
    if (best >= rules_.found * std::max(1.0, second)) {
      index_ = ranked[0].index;
      run_ = ranked[0].match;
      lost_ = 0;
      return {place(index_, run_, 1.0)};
    }
    if (static_cast<int64_t>(ranked.size()) > rules_.branches) ranked.resize(rules_.branches);
    return ranked;
  }

  Continuation after(const Place& place) const {
    const int64_t left = std::max<int64_t>(0, size() - place.index), known = rules_.odds.size() - place.match;
    return {tokens_.data() + std::min(place.index, size()), std::min(left, known), rules_.odds.data() + place.match, place.factor};
  }

 private:
  using Places = std::vector<int32_t>;
  using At = Places::const_iterator;

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }

  Place place(int64_t index, int64_t match, double factor) const { return {index, match, factor, rules_.odds[match] * factor}; }

  static bool likelier(const Place& one, const Place& other) { return one.odds > other.odds; }

  std::array<int64_t, kFarMatch> last_before(int32_t end) const {
    std::array<int64_t, kFarMatch> last;
    for (int64_t back = 0; back < kFarMatch; ++back) last[back] = tokens_[end - back];
    return last;
  }

  // The likeliest places where the end of the text stands in the prediction; `last` is its last token.
  std::vector<Place> matches(const int64_t* last, int64_t tail) const {
    std::vector<Place> found;
    for (const int32_t end : ends(last, tail)) {
      int64_t match = 1;
      while (match < tail && match <= end && tokens_[end - match] == last[-match]) ++match;
      const int64_t ahead = end + 1 - index_;
      const int64_t beyond = std::max<int64_t>({ahead - lost_, -ahead, 0});
      found.push_back(place(end + 1, match, 1.0 / (1.0 + static_cast<double>(beyond) / rules_.reach)));
    }
    std::stable_sort(found.begin(), found.end(), likelier);
    if (static_cast<int64_t>(found.size()) > rules_.branches + 1) found.resize(rules_.branches + 1);
    return found;
  }

  // Where the last token stands: near to the edit, and further away where the ones before it match, too.
  Places ends(const int64_t* last, int64_t tail) const {
    const auto low = std::partition_point(ends_.begin(), ends_.end(), [&](int32_t end) { return tokens_[end] < *last; });
    const auto high = std::partition_point(low, ends_.end(), [&](int32_t end) { return tokens_[end] == *last; });
    const Places close = near(low, high);
    if (static_cast<int64_t>(close.size()) == high - low || tail < kFarMatch) return close;
    std::array<int64_t, kFarMatch> wanted;
    for (int64_t back = 0; back < kFarMatch; ++back) wanted[back] = last[-back];
    const auto first = std::partition_point(far_.begin(), far_.end(), [&](int32_t end) { return last_before(end) < wanted; });
    const auto behind = std::partition_point(first, far_.end(), [&](int32_t end) { return last_before(end) == wanted; });
    const Places distant = near(first, behind);
    Places all;
    std::set_union(close.begin(), close.end(), distant.begin(), distant.end(), std::back_inserter(all));
    return all;
  }

  // Of rising places those around the edit.
  Places near(At low, At high) const {
    const auto at = std::partition_point(low, high, [&](int32_t end) { return end < index_; });
    return Places(at - std::min<int64_t>(rules_.before, at - low), at + std::min<int64_t>(rules_.after, high - at));
  }

  const Rules& rules_;
  const std::vector<int32_t> tokens_;
  int64_t index_ = 0, run_, lost_ = 0;  // as in the definition
  int64_t seen_;                        // tokens of the text
  Places ends_, far_;                   // all places by the token there; by the last four
};

}  // namespace

// The alignments of all texts that are under way, by numbers that are given out here.
struct PredictionAlignments : torch::CustomClassHolder {
  PredictionAlignments(int64_t max_match, int64_t branches, int64_t trusted, int64_t long_edit, int64_t before,
                       int64_t after, std::vector<double> factors, std::vector<double> odds)
      : rules{max_match, branches, trusted, long_edit, before, after, factors.at(0), factors.at(1), factors.at(2),
              factors.at(3), factors.at(4), std::move(odds)} {
    TORCH_CHECK_VALUE(1 <= max_match && max_match <= kMaxTree && 1 <= branches && branches <= kMaxTree &&
                          int64_t(rules.odds.size()) > kMaxTree,
                      "no such matches");
  }

  // Follows a text with this prediction from its token number `seen` on. Returns a number for it.
  int64_t begin(Tensor prediction, int64_t seen) {
    const int64_t* tokens = index_data<int64_t>(prediction, "prediction");
    followed.try_emplace(next, rules, tokens, prediction.numel(), seen);
    return next++;
  }

  void forget(int64_t number) { followed.erase(number); }

  TreeArrays trees(const std::vector<int64_t>& numbers, const std::vector<Tensor>& texts,
                   const std::vector<int64_t>& max_nodes, const std::vector<int64_t>& max_depth, int64_t bit) {
    const int64_t rows = texts.size();
    TORCH_CHECK_VALUE(int64_t(numbers.size()) == rows && int64_t(max_nodes.size()) == rows && int64_t(max_depth.size()) == rows,
                      "a number and limits for each row");
    std::vector<std::vector<GuessedNode>> made(rows);
    std::vector<Continuation> guesses;
    for (int64_t row = 0; row < rows; ++row) {
      if (max_nodes[row] <= 0 || max_depth[row] <= 0) continue;
      const auto found = followed.find(numbers[row]);
      TORCH_CHECK_INDEX(found != followed.end(), "prediction: text ", numbers[row], " is not followed");
      Alignment& alignment = found->second;
      const int64_t* text = index_data<int64_t>(texts[row], "text");
      alignment.follow(text, texts[row].numel());
      guesses.clear();
      for (const Place& place : alignment.places(text, texts[row].numel())) guesses.push_back(alignment.after(place));
      made[row] = ContinuationTree<Continuation>(guesses).grow(max_nodes[row], max_depth[row]);
    }
    return guessed_trees(made, texts, bit);
  }

 private:
  const Rules rules;
  std::unordered_map<int64_t, Alignment> followed;
  int64_t next = 0;
};

TORCH_LIBRARY_FRAGMENT(saccade, m) {  // methods: a call of an operator with an object costs some microseconds more
  m.class_<PredictionAlignments>("PredictionAlignments")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, std::vector<double>, std::vector<double>>())
      .def("begin", &PredictionAlignments::begin)
      .def("forget", &PredictionAlignments::forget)
      .def("trees", &PredictionAlignments::trees);
}

}  // namespace saccade
