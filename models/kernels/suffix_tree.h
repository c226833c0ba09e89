// Suffix trees with counts over texts that grow and go: compressed edges, limited depth (Oliaro et al., 2411.04975).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace saccade {

constexpr int32_t kNone = -1;

// A node spells the tokens on the path to it. Every occurrence that enters an edge passes all of it: where a text ends
// within an edge, or two go different ways, there is a node. So all tokens of an edge have the same count.
struct SuffixNode {
  int32_t parent, token;  // the edge to the node begins with this token
  uint32_t text;          // the edge's label lies in the newest text that has it,
  int32_t start, length;  // at its last occurrence there
  int32_t count;          // occurrences
  int32_t ends;           // of those, after how many the text ends, or the depth limit is reached
  int32_t place;          // among the siblings
  struct Family {
    int32_t* ids;
    int32_t size, room;
  } children;  // the most frequent first; in no order at a root
};

// A position in a forest: behind the first `used` tokens of the edge to `node`.
struct SuffixPlace {
  int32_t node, used;
};

// Several trees, whose nodes, texts and hash table are shared. Texts are numbered in the order of their beginning, and
// leave a tree in that order: that is why an edge's label, in the newest text that has it, never vanishes before it.
class SuffixForest {
 public:
  explicit SuffixForest(int32_t depth) : depth_(depth), table_(16, kNone), shift_(60) {}
  ~SuffixForest() {
    for (int32_t id = 0; id < made_; ++id) std::free(node(id).children.ids);
  }
  SuffixForest(const SuffixForest&) = delete;
  SuffixForest& operator=(const SuffixForest&) = delete;

  struct Text {
    std::vector<int32_t> tokens;
    std::vector<int32_t> points;  // of the suffix that begins at s: the node where it ends, at s % depth; closed: none
    int32_t root = kNone;         // kNone: removed
    int64_t tree = 0;             // the caller's name for it
  };

  int32_t plant() { return allocate({kNone, kNone, 0, 0, 0, 0, 0, 0, {nullptr, 0, 0}}); }

  void uproot(int32_t root) { release(root); }

  uint32_t open(int32_t root, int64_t tree) {
    Text& text = texts_.emplace_back();
    text.root = root;
    text.tree = tree;
    text.points.resize(depth_);
    return first_ + static_cast<uint32_t>(texts_.size() - 1);
  }

  // O(depth): each of the last suffixes goes one token further.
  void append(uint32_t number, int32_t token) {
    Text& text = texts_[number - first_];
    const int32_t position = static_cast<int32_t>(text.tokens.size());
    text.tokens.push_back(token);
    int32_t start = std::max(0, position + 1 - depth_);
    int32_t slot = start % depth_;
    for (; start < position; ++start) {
      text.points[slot] = advance(text.points[slot], number, position);
      if (++slot == depth_) slot = 0;
    }
    ++node(text.root).count;
    ++node(text.root).ends;
    text.points[slot] = advance(text.root, number, position);
  }

  // No more tokens come.
  void close(uint32_t number) {
    Text& text = texts_[number - first_];
    std::vector<int32_t>().swap(text.points);
    text.tokens.shrink_to_fit();
  }

  // Takes all occurrences of a text out again: the oldest of its tree.
  void remove(uint32_t number) {
    Text& text = texts_[number - first_];
    const int32_t size = static_cast<int32_t>(text.tokens.size());
    for (int32_t start = 0; start < size; ++start) withdraw(text, start, std::min(start + depth_, size));
    text = Text();
    while (!texts_.empty() && texts_.front().root == kNone) {
      texts_.pop_front();
      ++first_;
    }
  }

  // Where these tokens lead from a root; node kNone where they never occurred.
  SuffixPlace locate(int32_t root, const int32_t* tokens, int32_t count) const {
    SuffixPlace place{root, 0};
    for (int32_t i = 0; i < count; i += place.used) {
      const int32_t id = child(place.node, tokens[i]);
      if (id == kNone) return {kNone, 0};
      const SuffixNode& n = node(id);
      const int32_t* label = label_of(n);
      place = {id, std::min(n.length, count - i)};
      for (int32_t k = 1; k < place.used; ++k)
        if (label[k] != tokens[i + k]) return {kNone, 0};
    }
    return place;
  }

  SuffixNode& node(int32_t id) { return blocks_[id >> kBlockBits][id & kBlockMask]; }
  const SuffixNode& node(int32_t id) const { return blocks_[id >> kBlockBits][id & kBlockMask]; }
  const Text& text(uint32_t number) const { return texts_[number - first_]; }
  const std::deque<Text>& texts() const { return texts_; }  // removed ones among them
  uint32_t first_text() const { return first_; }
  int32_t token_at(uint32_t number, int32_t position) const { return texts_[number - first_].tokens[position]; }
  bool has(uint32_t number) const {
    const uint32_t index = number - first_;  // a number below the first wraps around to far above all
    return index < texts_.size() && texts_[index].root != kNone;
  }

  int64_t nodes() const { return made_ - free_nodes_; }

  // Everything allocated; what the allocator needs besides is guessed.
  int64_t bytes() const {
    int64_t of_texts = 0;
    for (const Text& text : texts_)
      of_texts += sizeof(Text) + sizeof(int32_t) * (text.tokens.capacity() + text.points.capacity());
    return blocks_.size() * (sizeof(SuffixNode) << kBlockBits) + table_.capacity() * sizeof(int32_t) + family_bytes_ + of_texts;
  }

 private:
  static constexpr int32_t kBlockBits = 8, kBlockMask = (1 << kBlockBits) - 1;

  const int32_t* label_of(const SuffixNode& n) const { return texts_[n.text - first_].tokens.data() + n.start; }

  // Moves the end of one suffix of a text over the token at `position`, its newest; returns the node where it ends now.
  int32_t advance(int32_t at, uint32_t number, int32_t position) {
    SuffixNode& v = node(at);
    const bool alone = v.parent != kNone && v.ends == 1;  // no other text ends here
    if (alone && v.count == 1) {  // nor does any other pass: a leaf grows
      ++v.length;
      return at;
    }
    const int32_t token = token_at(number, position);
    const int32_t below = child(at, token);
    if (below == kNone) {
      --v.ends;
      return add_leaf(at, token, number, position);
    }
    if (alone && v.children.size == 1) return slide(at, below, number, position);
    --v.ends;
    const int32_t next = node(below).length == 1 ? below : split(below);
    raise(next);
    ++node(next).ends;
    label(node(next), number, position);
    return next;
  }

  // The suffix's end was the only reason for the node `at`: it moves along the edge to the only child.
  int32_t slide(int32_t at, int32_t below, uint32_t number, int32_t position) {
    SuffixNode &v = node(at), &w = node(below);
    if (w.length == 1) {
      fuse(at, below);
      ++w.ends;
      label(w, number, position);
      return below;
    }
    erase(below);
    ++w.start;
    --w.length;
    w.token = label_of(w)[0];
    insert(below);
    ++v.length;
    label(v, number, position);
    return at;
  }

  int32_t add_leaf(int32_t parent, int32_t token, uint32_t number, int32_t position) {
    const int32_t id = allocate({parent, token, number, position, 1, 1, 1, 0, {nullptr, 0, 0}});
    insert(id);
    adopt(parent, id);
    return id;
  }

  // Puts a node behind the first token of an edge; the lower part keeps its id.
  int32_t split(int32_t id) {
    const SuffixNode old = node(id);
    const int32_t upper = allocate({old.parent, old.token, old.text, old.start, 1, old.count, 0, old.place, {nullptr, 0, 0}});
    *slot_of(id) = upper;
    node(old.parent).children.ids[old.place] = upper;
    SuffixNode& n = node(id);
    n.parent = upper;
    ++n.start;
    --n.length;
    n.token = label_of(n)[0];
    insert(id);
    adopt(upper, id);
    return upper;
  }

  // A node that has nothing but one child goes; the child takes its place.
  void fuse(int32_t at, int32_t below) {
    SuffixNode &v = node(at), &w = node(below);
    erase(below);
    *slot_of(at) = below;
    w.parent = v.parent;
    w.token = v.token;
    w.start -= v.length;
    w.length += v.length;
    w.count = v.count;
    w.place = v.place;
    node(v.parent).children.ids[v.place] = below;
    release(at);
  }

  // Takes one occurrence out of the path of a text's tokens `start` .. `end` - 1.
  void withdraw(const Text& text, int32_t start, int32_t end) {
    int32_t at = text.root;
    --node(at).count;
    for (int32_t i = start; i < end; i += node(at).length) {
      at = child(at, text.tokens[i]);
      lower(at);
    }
    --node(at).ends;
    while (at != text.root && node(at).count == 0) {
      const int32_t parent = node(at).parent;
      abandon(at);
      at = parent;
    }
    const SuffixNode& n = node(at);
    if (at != text.root && n.ends == 0 && n.children.size == 1) fuse(at, n.children.ids[0]);
  }

  // The text's newest token ends this edge, too.
  void label(SuffixNode& n, uint32_t number, int32_t position) {
    if (static_cast<int32_t>(number - n.text) < 0) return;  // numbers may wrap around
    n.text = number;
    n.start = position + 1 - n.length;
  }

  // children ----------------------------------------------------------------------------------------------------------

  int32_t child(int32_t parent, int32_t token) const {
    const SuffixNode::Family& family = node(parent).children;
    if (family.size == 0) return kNone;
    if (family.size == 1) return node(family.ids[0]).token == token ? family.ids[0] : kNone;
    for (size_t i = home(parent, token);; i = i + 1 & table_.size() - 1) {
      const int32_t id = table_[i];
      if (id == kNone || (node(id).token == token && node(id).parent == parent)) return id;
    }
  }

  void adopt(int32_t parent, int32_t id) {
    SuffixNode::Family& family = node(parent).children;
    if (family.size == family.room) resize(family, std::max(2, 2 * family.room));
    node(id).place = family.size;
    family.ids[family.size++] = id;
  }

  // A node without occurrences goes.
  void abandon(int32_t id) {
    SuffixNode::Family& family = node(node(id).parent).children;
    erase(id);
    exchange(family.ids, node(id).place, family.size - 1);  // in an ordered family it is the last
    --family.size;
    if (family.size == 0)
      resize(family, 0);
    else if (family.room > 4 && family.size <= family.room / 4)
      resize(family, family.room / 2);
    release(id);
  }

  void resize(SuffixNode::Family& family, int32_t room) {
    family_bytes_ += family_cost(room) - family_cost(family.room);
    if (room == 0) {
      std::free(family.ids);
      family.ids = nullptr;
    } else {
      auto* moved = static_cast<int32_t*>(std::realloc(family.ids, room * sizeof(int32_t)));
      if (moved == nullptr) throw std::bad_alloc();
      family.ids = moved;
    }
    family.room = room;
  }

  static int64_t family_cost(int32_t room) { return room == 0 ? 0 : std::max<int64_t>(32, room * sizeof(int32_t) + 16); }

  // One occurrence more: the node changes places with the first sibling that had as many. A root's children are many,
  // and nobody asks for their order.
  void raise(int32_t id) {
    SuffixNode& n = node(id);
    if (node(n.parent).parent == kNone) {
      ++n.count;
      return;
    }
    int32_t* ids = node(n.parent).children.ids;
    int32_t* first = std::partition_point(ids, ids + n.place, [&](int32_t other) { return node(other).count > n.count; });
    exchange(ids, first - ids, n.place);
    ++n.count;
  }

  // One occurrence less: it changes places with the last sibling that had as many.
  void lower(int32_t id) {
    SuffixNode& n = node(id);
    if (node(n.parent).parent == kNone) {
      --n.count;
      return;
    }
    const SuffixNode::Family& family = node(n.parent).children;
    int32_t* end = std::partition_point(family.ids + n.place, family.ids + family.size,
                                        [&](int32_t other) { return node(other).count >= n.count; });
    exchange(family.ids, end - 1 - family.ids, n.place);
    --n.count;
  }

  void exchange(int32_t* ids, int32_t a, int32_t b) {
    std::swap(ids[a], ids[b]);
    node(ids[a]).place = a;
    node(ids[b]).place = b;
  }

  // the hash table, from (parent, first token of the edge) to nodes: open addressing, no tombstones ---------------------

  size_t home(int32_t parent, int32_t token) const {
    const uint64_t key = static_cast<uint64_t>(static_cast<uint32_t>(parent)) << 32 | static_cast<uint32_t>(token);
    return (key ^ key >> 29) * 0x9E3779B97F4A7C15u >> shift_;
  }

  int32_t* slot_of(int32_t id) {
    size_t i = home(node(id).parent, node(id).token);
    while (table_[i] != id) i = i + 1 & table_.size() - 1;
    return &table_[i];
  }

  void insert(int32_t id) {
    if (10 * ++entries_ > 7 * static_cast<int64_t>(table_.size())) rehash();
    put(id);
  }

  void put(int32_t id) {
    size_t i = home(node(id).parent, node(id).token);
    while (table_[i] != kNone) i = i + 1 & table_.size() - 1;
    table_[i] = id;
  }

  void rehash() {
    const std::vector<int32_t> old = std::move(table_);
    table_.assign(2 * old.size(), kNone);
    --shift_;
    for (const int32_t id : old)
      if (id != kNone) put(id);
  }

  // The entries behind the gap that it cuts off from their homes move up.
  void erase(int32_t id) {
    const size_t mask = table_.size() - 1;
    size_t gap = slot_of(id) - table_.data();
    for (size_t i = gap + 1 & mask; table_[i] != kNone; i = i + 1 & mask) {
      const size_t wanted = home(node(table_[i]).parent, node(table_[i]).token);
      if ((i - wanted & mask) >= (i - gap & mask)) {
        table_[gap] = table_[i];
        gap = i;
      }
    }
    table_[gap] = kNone;
    --entries_;
  }

  // nodes -------------------------------------------------------------------------------------------------------------

  int32_t allocate(const SuffixNode& value) {
    int32_t id = free_;
    if (id == kNone) {
      id = made_++;
      if (!(id & kBlockMask)) blocks_.push_back(std::make_unique<SuffixNode[]>(size_t{1} << kBlockBits));
    } else {
      free_ = node(id).parent;
      --free_nodes_;
    }
    node(id) = value;
    return id;
  }

  void release(int32_t id) {
    SuffixNode& n = node(id);
    if (n.children.ids != nullptr) resize(n.children, 0);
    n.parent = free_;
    free_ = id;
    ++free_nodes_;
  }

  const int32_t depth_;
  std::vector<std::unique_ptr<SuffixNode[]>> blocks_;
  int32_t made_ = 0, free_ = kNone;  // nodes that ever were; the first of those to be used again, the next is its parent
  int64_t free_nodes_ = 0;
  std::deque<Text> texts_;
  uint32_t first_ = 0;  // number of the first
  std::vector<int32_t> table_;
  int32_t shift_;
  int64_t entries_ = 0, family_bytes_ = 0;
};

}  // namespace saccade
