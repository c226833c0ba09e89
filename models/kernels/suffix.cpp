// The suffix drafter's trees and its search (decoding/drafters/suffix_search.py, which defines what comes out).
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "host_trees.h"
#include "suffix_tree.h"
#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

struct Guess {
  int64_t parent, token;  // parent: a column
  double confidence;
};

struct Draft {
  std::vector<Guess> guesses;
  double score = 0.0;
};

struct Match {
  SuffixPlace place;
  int32_t count;  // occurrences
};

struct Candidate {
  double prob;   // of its path, by counts alone
  double reach;  // of the path to its parent, by confidences
  double share;  // of its parent's occurrences that go on, how many go on with it
  int64_t column, level;
  SuffixPlace place;
  uint32_t text;  // where it last occurred
  int32_t position;
};

// Whether b goes first: it is more probable, or its parent came first, or it occurred later.
bool behind(const Candidate& a, const Candidate& b) {
  if (a.prob != b.prob) return a.prob < b.prob;
  if (a.column != b.column) return a.column > b.column;
  if (a.text != b.text) return static_cast<int32_t>(a.text - b.text) < 0;
  return a.position < b.position;
}

class Search {
 public:
  Search(int64_t max_depth, double factor, double min_prob, std::vector<double> trust)
      : max_depth_(max_depth), factor_(factor), min_prob_(min_prob), trust_(std::move(trust)) {}

  // The draft of the best score; of equals, that of the longest match. matches: of lengths 1, 2, ...
  Draft best(const SuffixForest& forest, const std::vector<Match>& matches, int64_t nodes, int64_t depth) {
    Draft best;
    const int64_t longest = matches.size();
    for (int64_t length = 1; length <= longest; ++length) {
      // the next longer match has the same occurrences, and may draft more of the same
      if (length < longest && matches[length].count == matches[length - 1].count && depth <= max_depth_ - (length + 1)) continue;
      Draft made = draft(forest, matches[length - 1].place, length, nodes, depth);
      if (made.score >= best.score) best = std::move(made);
    }
    return best;
  }

 private:
  Draft draft(const SuffixForest& forest, SuffixPlace match, int64_t length, int64_t nodes, int64_t depth) {
    Draft made;
    const int64_t most = std::min<int64_t>(nodes, static_cast<int64_t>(factor_ * length));
    const int64_t deepest = std::min(depth, max_depth_ - length);
    queue_.clear();
    extend(forest, match, 1.0, 1.0, 0, 1);
    while (!queue_.empty() && static_cast<int64_t>(made.guesses.size()) < most) {
      std::pop_heap(queue_.begin(), queue_.end(), behind);
      const Candidate next = queue_.back();
      queue_.pop_back();
      const double confidence = next.share * trust_[length + next.level - 1];
      const double reach = next.reach * confidence;
      made.guesses.push_back({next.column, forest.token_at(next.text, next.position), confidence});
      made.score += reach;
      if (next.level < deepest) extend(forest, next.place, next.prob, reach, made.guesses.size(), next.level + 1);
    }
    return made;
  }

  void extend(const SuffixForest& forest, SuffixPlace place, double prob, double reach, int64_t column, int64_t level) {
    const SuffixNode& n = forest.node(place.node);
    if (place.used < n.length)
      return push({prob, reach, 1.0, column, level, {place.node, place.used + 1}, n.text, n.start + place.used});
    const double followed = n.count - n.ends;
    for (int32_t i = 0; i < n.children.size; ++i) {
      const int32_t id = n.children.ids[i];
      const SuffixNode& child = forest.node(id);
      const double share = child.count / followed;
      if (prob * share < min_prob_) break;  // nor are the others more frequent
      push({prob * share, reach, share, column, level, {id, 1}, child.text, child.start});
    }
  }

  void push(const Candidate& candidate) {
    queue_.push_back(candidate);
    std::push_heap(queue_.begin(), queue_.end(), behind);
  }

  const int64_t max_depth_;
  const double factor_, min_prob_;
  const std::vector<double> trust_;  // by length of the match
  std::vector<Candidate> queue_;     // a heap; kept for its memory
};

}  // namespace

// What of texts is kept for drafting: a tree for each text that is under way, and trees of outputs.
struct SuffixCache : torch::CustomClassHolder {
  SuffixCache(int64_t max_depth, int64_t max_bytes, int64_t max_requests, int64_t token_bytes, int64_t request_bytes,
              int64_t learn_tokens, double factor, double min_prob, std::vector<double> trust)
      : max_depth(max_depth), max_bytes(max_bytes), max_requests(max_requests), token_bytes(token_bytes),
        request_bytes(request_bytes), learn_tokens(learn_tokens), outputs(static_cast<int32_t>(max_depth)),
        search(max_depth, factor, min_prob, std::move(trust)) {}

  struct Follower {
    int64_t tree = 0, learned = 0;
    std::unique_ptr<SuffixForest> own;  // of the whole text; made when it is first asked for
    int32_t root = kNone;
    uint32_t text = 0;  // its output's number; see `learning`
    bool learning = false;
  };

  // Follows a text whose first `known` tokens are not to be learned (again). Returns a number for it.
  int64_t admit(int64_t tree, int64_t known) {
    Follower& follower = followers[next];
    follower.tree = tree;
    follower.learned = known;
    return next++;
  }

  // The text ended. keep: its output stays.
  void forget(int64_t number, Tensor text, bool keep) {
    Follower& follower = followers.at(number);
    if (keep) {
      learn(follower, index_data<int64_t>(text, "text"), text.numel());
      if (knows(follower)) outputs.close(follower.text);
    } else if (knows(follower)) {
      remove(follower.text);
    }
    followers.erase(number);
  }

  // Adds an output of old.
  void insert(int64_t tree, Tensor tokens) {
    Follower follower;
    follower.tree = tree;
    learn(follower, index_data<int64_t>(tokens, "tokens"), tokens.numel());
    if (knows(follower)) outputs.close(follower.text);
  }

  // All outputs, the oldest first: their trees [n] and lengths [n] int64, their tokens [sum of lengths] int32.
  std::tuple<Tensor, Tensor, Tensor> texts() {
    const Tensor trees = empty({requests}, at::kLong), lengths = empty({requests}, at::kLong), all = empty({tokens}, at::kInt);
    int64_t* tree = trees.mutable_data_ptr<int64_t>();
    int64_t* length = lengths.mutable_data_ptr<int64_t>();
    int32_t* to = all.mutable_data_ptr<int32_t>();
    for (const SuffixForest::Text& text : outputs.texts()) {
      if (text.root == kNone) continue;
      *tree++ = text.tree;
      *length++ = text.tokens.size();
      to = std::copy(text.tokens.begin(), text.tokens.end(), to);
    }
    return {trees, lengths, all};
  }

  // Of the outputs: requests, tokens, and where it can be said, nodes and bytes that are allocated.
  std::vector<int64_t> usage() {
    const int64_t tables = roots.size() * 64 + followers.size() * sizeof(Follower);
    return {requests, tokens, outputs.nodes(), outputs.bytes() + tables};
  }

  TreeArrays trees(const std::vector<int64_t>& numbers, const std::vector<Tensor>& given,
                   const std::vector<int64_t>& max_nodes, const std::vector<int64_t>& max_depth, int64_t bit) {
    const int64_t rows = given.size();
    TORCH_CHECK_VALUE(int64_t(numbers.size()) == rows && int64_t(max_nodes.size()) == rows && int64_t(max_depth.size()) == rows,
                      "a number and limits for each row");
    std::vector<std::vector<Guess>> drafts(rows);
    for (int64_t row = 0; row < rows; ++row) {
      if (max_nodes[row] <= 0 || max_depth[row] <= 0) continue;
      const int64_t* text = index_data<int64_t>(given[row], "text");
      drafts[row] = draft(numbers[row], text, given[row].numel(), max_nodes[row], max_depth[row]).guesses;
    }
    return guessed_trees(drafts, given, bit);
  }

  Draft draft(int64_t number, const int64_t* text, int64_t count, int64_t nodes, int64_t depth) {
    Follower& follower = followers.at(number);
    if (count - follower.learned >= learn_tokens) learn(follower, text, count);
    if (!follower.own) {
      follower.own = std::make_unique<SuffixForest>(static_cast<int32_t>(max_depth));
      follower.root = follower.own->plant();
      follower.own->open(follower.root, 0);
    }
    SuffixForest& own = *follower.own;
    for (int64_t i = own.text(0).tokens.size(); i < count; ++i) own.append(0, static_cast<int32_t>(text[i]));
    const std::vector<int32_t>& context = own.text(0).tokens;
    const int64_t longest = std::min(count, max_depth - 1);

    matches.clear();
    for (int64_t length = 1; length <= longest; ++length) {
      const int32_t end = own.text(0).points[(count - length) % max_depth];
      const SuffixNode& node = own.node(end);
      if (node.count == node.ends) break;
      matches.push_back({{end, node.length}, node.count});
    }
    Draft best = search.best(own, matches, nodes, depth);

    const auto found = roots.find(follower.tree);
    if (found == roots.end()) return best;
    matches.clear();
    for (int64_t length = 1; length <= longest; ++length) {
      const SuffixPlace place = outputs.locate(found->second, context.data() + count - length, static_cast<int32_t>(length));
      if (place.node == kNone) break;
      const SuffixNode& node = outputs.node(place.node);
      if (place.used == node.length && node.count == node.ends) break;
      matches.push_back({place, node.count});
    }
    Draft others = search.best(outputs, matches, nodes, depth);
    return others.score > best.score ? others : best;
  }

  // Adds what is new of a text to the outputs. Where its beginning had to give way, it begins anew.
  void learn(Follower& follower, const int64_t* text, int64_t count) {
    for (; follower.learned < count; ++follower.learned) {
      while (requests > 0 && !fits(tokens + 1, requests + !knows(follower))) remove(oldest());
      if (!knows(follower)) {
        const auto [place, fresh] = roots.try_emplace(follower.tree, kNone);
        if (fresh) place->second = outputs.plant();
        follower.text = outputs.open(place->second, follower.tree);
        follower.learning = true;
        ++requests;
      }
      outputs.append(follower.text, static_cast<int32_t>(text[follower.learned]));
      ++tokens;
    }
  }

  bool fits(int64_t some_tokens, int64_t some_requests) const {
    return some_requests <= max_requests && some_tokens * token_bytes + some_requests * request_bytes <= max_bytes;
  }

  bool knows(const Follower& follower) const { return follower.learning && outputs.has(follower.text); }

  uint32_t oldest() const { return outputs.first_text(); }  // removed ones in front are gone

  void remove(uint32_t number) {
    const SuffixForest::Text& text = outputs.text(number);
    const int64_t tree = text.tree;
    const int32_t root = text.root;
    tokens -= text.tokens.size();
    --requests;
    outputs.remove(number);
    if (outputs.node(root).count) return;
    outputs.uproot(root);
    roots.erase(tree);
  }

  const int64_t max_depth, max_bytes, max_requests, token_bytes, request_bytes, learn_tokens;
  SuffixForest outputs;
  std::unordered_map<int64_t, int32_t> roots;  // in `outputs`
  std::unordered_map<int64_t, Follower> followers;
  int64_t next = 0, tokens = 0, requests = 0;
  Search search;
  std::vector<Match> matches;  // kept for its memory
};

TORCH_LIBRARY_FRAGMENT(saccade, m) {  // methods: a call of an operator with an object costs some microseconds more
  m.class_<SuffixCache>("SuffixCache")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, std::vector<double>>())
      .def("admit", &SuffixCache::admit)
      .def("forget", &SuffixCache::forget)
      .def("insert", &SuffixCache::insert)
      .def("texts", &SuffixCache::texts)
      .def("usage", &SuffixCache::usage)
      .def("trees", &SuffixCache::trees);
}

}  // namespace saccade
