// Lookahead decoding's pools and windows, and what they draft (decoding/drafters/lookahead_states.py, which defines what
// comes out), for all rows in one call.
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <list>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "host_trees.h"
#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

constexpr int64_t kPins = 32;  // PINS in models/tree.py
constexpr int64_t kMaxTree = 64;

struct Rules {
  int64_t level, width, guesses;  // tokens of an n-gram; columns of a window, tails of a first token at most
  int64_t keys, occurrences;
  double first, further, rival, ahead;

  int64_t tail() const { return level - 1; }
};

using Text = std::vector<int32_t>;

// The n-grams of one text by their first token: NgramPool of ngram_pool.py.
class Pool {
 public:
  Pool(const Rules& rules, const Text& text) : rules_(rules), text_(text), order_(std::max<int64_t>(0, starts())) {
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) { return text_[a] < text_[b]; });
  }

  // Remembers a first token and the ones after it.
  void add(int32_t first, const int32_t* tail) {
    std::vector<int32_t>& tails = of(first);
    const int64_t length = rules_.tail();
    auto at = tails.begin();
    while (at != tails.end() && !std::equal(tail, tail + length, at)) at += length;
    if (at == tails.end() && count(tails) == rules_.guesses) at = tails.begin();
    if (at != tails.end()) tails.erase(at, at + length);
    tails.insert(tails.end(), tail, tail + length);
  }

  // The tails of a token one after the other, the most recent at the end.
  const std::vector<int32_t>& find(int32_t first) { return of(first); }

  int64_t count(const std::vector<int32_t>& tails) const { return static_cast<int64_t>(tails.size()) / rules_.tail(); }

  int64_t held() const {
    int64_t all = 0;
    for (const Entry& entry : entries_) all += count(entry.tails);
    return all;
  }

 private:
  struct Entry {
    int32_t first;
    std::vector<int32_t> tails;
  };

  int64_t starts() const { return static_cast<int64_t>(text_.size()) - rules_.tail(); }

  std::vector<int32_t>& of(int32_t first) {
    const auto known = places_.find(first);
    if (known != places_.end()) {
      entries_.splice(entries_.end(), entries_, known->second);
      return entries_.back().tails;
    }
    if (static_cast<int64_t>(entries_.size()) == rules_.keys) {
      places_.erase(entries_.front().first);
      entries_.pop_front();
    }
    entries_.push_back({first, in_text(first)});
    places_[first] = std::prev(entries_.end());
    return entries_.back().tails;
  }

  // The last different tails of a token in the text, the latest at the end.
  std::vector<int32_t> in_text(int32_t first) const {
    const auto low = std::partition_point(order_.begin(), order_.end(), [&](int32_t at) { return text_[at] < first; });
    const auto high = std::partition_point(low, order_.end(), [&](int32_t at) { return text_[at] == first; });
    const int64_t length = rules_.tail();
    std::vector<const int32_t*> found;
    for (auto at = high; at != low && high - at < rules_.occurrences; --at) {
      const int32_t* tail = text_.data() + *(at - 1) + 1;
      const auto same = [&](const int32_t* other) { return std::equal(tail, tail + length, other); };
      if (std::any_of(found.begin(), found.end(), same)) continue;
      found.push_back(tail);
      if (static_cast<int64_t>(found.size()) == rules_.guesses) break;
    }
    std::vector<int32_t> tails;
    for (auto tail = found.rbegin(); tail != found.rend(); ++tail) tails.insert(tails.end(), *tail, *tail + length);
    return tails;
  }

  const Rules& rules_;
  const Text& text_;
  std::vector<int32_t> order_;  // places in the text by the token there
  std::list<Entry> entries_;    // in the order of their last use
  std::unordered_map<int32_t, std::list<Entry>::iterator> places_;
};

struct Node {
  int64_t parent, token, source;
  double confidence;
};

// A row's proposal; nodes of one parent and token are one.
class Tree {
 public:
  std::vector<Node> nodes;  // the first stands in column 1

  // The column of a node; 0: it is not there.
  int64_t find(int64_t parent, int64_t token) const {
    for (size_t i = 0; i < nodes.size(); ++i)
      if (nodes[i].parent == parent && nodes[i].token == token) return i + 1;
    return 0;
  }

  // The column of a node that is there now.
  int64_t child(int64_t parent, int64_t token, double confidence, int64_t source) {
    const int64_t column = find(parent, token);
    if (column == 0) {
      nodes.push_back({parent, token, source, confidence});
      return nodes.size();
    }
    Node& node = nodes[column - 1];
    node.confidence = std::max(node.confidence, confidence);
    node.source |= source;
    return column;
  }
};

// Several guesses at the same stretch of text: Window of lookahead_window.py.
class Window {
 public:
  Window(const Rules& rules, int64_t width, const Text& text, uint64_t seed)
      : rules_(rules), text_(text), luck_(seed), width_(width), tokens_(rows() * width), drawn_(width, 0) {
    for (int32_t& token : tokens_) token = any();
  }

  int64_t nodes() const { return width_ * rows(); }
  int64_t depth() const { return width_ + rows_below_first(); }
  int64_t width() const { return width_; }
  int64_t rows() const { return rules_.level - 1; }
  int32_t at(int64_t row, int64_t column) const { return tokens_[row * width_ + column]; }

  // The columns become n-grams of the pool, rows move up, and the tokens that were drawn are the last one.
  void advance(const int64_t* after, Pool& pool) {
    std::vector<int32_t> tail(rules_.tail());
    for (int64_t column = 0; column < width_; ++column) {
      if (drawn_[column]++ < rules_.level - 2) continue;  // a random token is in it
      for (int64_t row = 1; row < rows(); ++row) tail[row - 1] = at(row, column);
      tail.back() = static_cast<int32_t>(after[column]);
      pool.add(at(0, column), tail.data());
    }
    std::copy(tokens_.begin() + width_, tokens_.end(), tokens_.begin());
    std::copy(after, after + width_, tokens_.end() - width_);
  }

  // The text has grown by so many more tokens: columns that it has overtaken begin anew.
  void slide(int64_t count) {
    const int64_t gone = std::min(count, width_);
    if (gone <= 0) return;
    for (int64_t row = 0; row < rows(); ++row) slide(tokens_.begin() + row * width_, gone, [&] { return any(); });
    slide(drawn_.begin(), gone, [] { return 0; });
  }

  // Columns of the last row's nodes in a tree, by node_of(column of the parent, token); empty where one is 0.
  template <typename NodeOf>
  std::vector<int64_t> place(const NodeOf& node_of) const {
    std::vector<int64_t> above(width_);
    for (int64_t row = 0; row < rows(); ++row)
      for (int64_t column = 0; column < width_; ++column) {
        const int64_t parent = row ? above[column] : column ? above[column - 1] : 0;
        above[column] = node_of(parent, at(row, column));
        if (above[column] == 0) return {};
      }
    return above;
  }

 private:
  int64_t rows_below_first() const { return rules_.level - 2; }

  template <typename At, typename New>
  void slide(At first, int64_t gone, const New& fresh) {
    std::copy(first + gone, first + width_, first);
    std::generate(first + (width_ - gone), first + width_, fresh);
  }

  // A random token of the text (SplitMix64, Steele et al. 2014).
  int32_t any() {
    uint64_t z = luck_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return text_[(z >> 32) * text_.size() >> 32];
  }

  const Rules& rules_;
  const Text& text_;
  uint64_t luck_;
  const int64_t width_;
  std::vector<int32_t> tokens_;  // [rows, width]
  std::vector<int32_t> drawn_;   // rows of each column that were drawn, from the last one up
};

// What is kept of one text.
struct State {
  State(const Rules& rules, int64_t seed, const int64_t* tokens, int64_t count)
      : rules(rules), seed(seed), text(tokens, tokens + count), pool(rules, text), read(std::max<int64_t>(0, count - rules.tail())) {}

  const Rules& rules;
  const uint64_t seed;
  const Text text;  // as it was at first
  Pool pool;
  int64_t read;  // places of the text whose n-grams the pool has
  std::optional<Window> window;
  int64_t length = 0;  // of the text that the window stands behind

  void follow(const int64_t* tokens, int64_t count) {
    std::vector<int32_t> tail(rules.tail());
    for (; read + rules.tail() < count; ++read) {
      std::copy(tokens + read + 1, tokens + read + rules.level, tail.begin());
      pool.add(static_cast<int32_t>(tokens[read]), tail.data());
    }
  }

  // The window if the row has room for it, else null. Its width is that for which there was room at first.
  Window* fitting(int64_t count, int64_t nodes, int64_t depth) {
    if (!window) {
      const int64_t share = nodes * rules.width / (rules.width + rules.guesses);
      const int64_t width = std::min({rules.width, share / rules.tail(), depth - rules.level + 2});
      if (width <= 0) return nullptr;
      window.emplace(rules, width, text, seed);
      length = count;
    }
    if (window->nodes() > nodes || window->depth() > depth) return nullptr;
    window->slide(count - length);
    length = count;
    return &*window;
  }

  void hang_guesses(Tree& tree, int64_t root, int64_t nodes, int64_t depth, int64_t guess) {
    const std::vector<int32_t>& tails = pool.find(static_cast<int32_t>(root));
    const int64_t longest = std::min(rules.tail(), depth);
    int64_t rivals[kMaxTree + 1] = {};  // guessed children of each column
    for (int64_t number = pool.count(tails) - 1; number >= 0; --number) {
      const int32_t* tail = tails.data() + number * rules.tail();
      int64_t node = 0;
      double chance = rules.first;
      for (int64_t i = 0; i < longest; ++i) {
        int64_t column = tree.find(node, tail[i]);
        if (column == 0 && static_cast<int64_t>(tree.nodes.size()) >= nodes) return;
        if (column == 0 || !(tree.nodes[column - 1].source & guess)) {
          const double fading = std::pow(rules.rival, static_cast<double>(rivals[node]++));
          column = tree.child(node, tail[i], chance * fading, guess);
        }
        node = column;
        chance = rules.further;
      }
    }
  }
};

// One tree of a batch, of which packed tokens and ancestor masks are known.
struct Verified {
  const int64_t *tokens, *masks;
  int64_t count;

  // The column of a node; 0: it is not there. Padding looks like a child of the root, and stands behind its children.
  int64_t find(int64_t parent, int64_t token) const {
    for (int64_t column = 1; column < count; ++column) {
      if (tokens[column] != token) continue;
      const uint64_t above = static_cast<uint64_t>(masks[column]) & ~(uint64_t{1} << column);
      if (above != 0 && 63 - __builtin_clzll(above) == parent) return column;
    }
    return 0;
  }
};

}  // namespace

// The states of all texts that are under way, by numbers that are given out here.
struct LookaheadStates : torch::CustomClassHolder {
  LookaheadStates(int64_t level, int64_t width, int64_t guesses, int64_t keys, int64_t occurrences, double first,
                  double further, double rival, double ahead)
      : rules{level, width, guesses, keys, occurrences, first, further, rival, ahead} {
    TORCH_CHECK_VALUE(level >= 3 && width >= 1 && guesses >= 1 && keys >= 1 && (level - 1) * width < kMaxTree,
                      "no such n-grams or windows");
  }

  int64_t begin(int64_t seed) {
    texts[next].seed = seed;
    return next++;
  }

  void forget(int64_t number) { texts.erase(number); }

  // Trees of the rows, and the width of the window in each of them.
  std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<int64_t>> trees(
      const std::vector<int64_t>& numbers, const std::vector<Tensor>& given, const std::vector<int64_t>& max_nodes,
      const std::vector<int64_t>& max_depth, int64_t bit) {
    const int64_t rows = given.size(), guess = int64_t{1} << bit, pin = int64_t{1} << (kPins + bit);
    TORCH_CHECK_VALUE(int64_t(numbers.size()) == rows && int64_t(max_nodes.size()) == rows && int64_t(max_depth.size()) == rows,
                      "a number and limits for each row");
    std::vector<Tree> made(rows);
    std::vector<int64_t> widths(rows, 0);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t nodes = std::min(max_nodes[row], kMaxTree - 1), depth = max_depth[row], count = given[row].numel();
      if (nodes <= 0) continue;
      const int64_t* text = index_data<int64_t>(given[row], "text");
      TORCH_CHECK_VALUE(count >= 1, "a text is missing");
      State& state = of(numbers[row], text, count);
      state.follow(text, count);
      Tree& tree = made[row];
      if (const Window* window = state.fitting(count, nodes, depth)) {
        window->place([&](int64_t parent, int64_t token) { return tree.child(parent, token, rules.ahead, pin); });
        widths[row] = window->width();
      }
      state.hang_guesses(tree, text[count - 1], nodes, depth, guess);
    }
    std::vector<std::vector<Node>> drafted;
    for (Tree& tree : made) drafted.push_back(std::move(tree.nodes));
    const auto [tokens, parents, confidence, source] = tree_arrays(
        drafted, [&](int64_t row) { return last_token(given[row]); }, [](const Node& node) { return node.source; });
    return {tokens, parents, confidence, source, widths};
  }

  // Lets the windows move on with what was drawn in the step that verified them. numbers [S]: texts, -1 for rows without
  // a window; tokens, masks and drawn are those of the W nodes, of which row s has those from first[s] on.
  void learn(const std::vector<int64_t>& numbers, const Tensor& tokens, const Tensor& masks, const Tensor& drawn,
             const Tensor& first) {
    const int64_t rows = numbers.size(), nodes = tokens.numel();
    TORCH_CHECK_VALUE(first.numel() == rows && masks.numel() == nodes && drawn.numel() == nodes,
                      "lookahead: a first node for each row; a mask and a token drawn for each node");
    const int64_t *token = index_data<int64_t>(tokens, "tokens"), *mask = index_data<int64_t>(masks, "masks");
    const int64_t *after = index_data<int64_t>(drawn, "drawn"), *root = index_data<int64_t>(first, "first");
    for (int64_t row = 0; row < rows; ++row) {
      State* state = numbers[row] < 0 ? nullptr : find(numbers[row]);
      if (state == nullptr || !state->window) continue;
      const int64_t end = row + 1 < rows ? root[row + 1] : nodes;
      TORCH_CHECK_INDEX(root[row] >= 0 && root[row] < end && end <= nodes && end - root[row] <= kMaxTree,
                        "lookahead: row ", row, " has no such nodes");
      const Verified tree{token + root[row], mask + root[row], end - root[row]};
      std::vector<int64_t> last = state->window->place([&](int64_t parent, int64_t of) { return tree.find(parent, of); });
      if (last.empty()) continue;  // it was not bought
      for (int64_t& column : last) column = after[root[row] + column];
      state->window->advance(last.data(), state->pool);
      ++state->length;
    }
  }

  // Both in one call, which costs more than what either does.
  auto learn_and_draft(const std::vector<int64_t>& waiting, const Tensor& tokens, const Tensor& masks, const Tensor& drawn,
                       const Tensor& first, const std::vector<int64_t>& numbers, const std::vector<Tensor>& given,
                       const std::vector<int64_t>& max_nodes, const std::vector<int64_t>& max_depth, int64_t bit) {
    learn(waiting, tokens, masks, drawn, first);
    return trees(numbers, given, max_nodes, max_depth, bit);
  }

  // [N - 1, W] the tokens of a text's window; [0, 0]: it has none.
  Tensor window(int64_t number) {
    const Entry& entry = texts.at(number);
    if (!entry.state || !entry.state->window) return empty({0, 0}, at::kLong);
    const Window& found = *entry.state->window;
    const Tensor tokens = empty({found.rows(), found.width()}, at::kLong);
    int64_t* to = tokens.mutable_data_ptr<int64_t>();
    for (int64_t row = 0; row < found.rows(); ++row)
      for (int64_t column = 0; column < found.width(); ++column) *to++ = found.at(row, column);
    return tokens;
  }

  // Texts, and n-grams that are held.
  std::vector<int64_t> usage() {
    int64_t held = 0;
    for (const auto& [number, entry] : texts) held += entry.state ? entry.state->pool.held() : 0;
    return {static_cast<int64_t>(texts.size()), held};
  }

 private:
  State* find(int64_t number) {
    const auto found = texts.find(number);
    return found == texts.end() ? nullptr : found->second.state.get();
  }

  // The state of a text, made when the text is first seen.
  State& of(int64_t number, const int64_t* text, int64_t count) {
    const auto found = texts.find(number);
    TORCH_CHECK_INDEX(found != texts.end(), "lookahead: text ", number, " is not under way");
    Entry& entry = found->second;
    if (!entry.state) entry.state = std::make_unique<State>(rules, entry.seed, text, count);
    return *entry.state;
  }

  struct Entry {
    int64_t seed = 0;
    std::unique_ptr<State> state;
  };

  const Rules rules;
  std::unordered_map<int64_t, Entry> texts;
  int64_t next = 0;
};

TORCH_LIBRARY_FRAGMENT(saccade, m) {  // methods: a call of an operator with an object costs some microseconds more
  m.class_<LookaheadStates>("LookaheadStates")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, int64_t, double, double, double, double>())
      .def("begin", &LookaheadStates::begin)
      .def("forget", &LookaheadStates::forget)
      .def("trees", &LookaheadStates::trees)
      .def("learn", &LookaheadStates::learn)
      .def("learn_and_draft", &LookaheadStates::learn_and_draft)
      .def("window", &LookaheadStates::window)
      .def("usage", &LookaheadStates::usage);
}

}  // namespace saccade
