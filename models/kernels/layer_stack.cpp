// All layers of a stack in one call. What they compute is defined, to the bit, by LayerStack in models/decoder.py.
//
// A small model's operations take longer to call one by one than to run. Here every thread goes through all of them and
// does its share of each (team.h), on memory taken once.
#include <omp.h>
#include <torch/library.h>

#include <optional>
#include <utility>
#include <vector>

#include "attention.h"
#include "layer_rows.h"
#include "layer_stack.h"
#include "team.h"
#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

// The tensors of a RaggedBatch (models/batch.py) that layers read.
struct Batch {
  const Tensor &positions, &slots, &visible, &tree_mask, &row_starts, &tree_base, &page_table;
};

// [tokens, width]; rows are `stride` apart.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;

  T* row(int64_t token) const { return data + token * stride; }
};

template <typename T>
Matrix<const T> as_input(Matrix<T> matrix) {
  return {matrix.data, matrix.stride};
}

template <typename T>
class Pass {
 public:
  Pass(const LayerStack& stack, const Batch& batch, const Tensor& keys, const Tensor& values, int64_t first_layer,
       const Tensor& stream)
      : s_(stack.shape),
        tokens_(stream.size(0)),
        half_(stack.rope.size(2)),
        rope_(stack.rope.const_data_ptr<float>()),
        positions_(batch.positions.const_data_ptr<int64_t>()),
        slots_(batch.slots.const_data_ptr<int64_t>()),
        final_norm_(stack.final_norm ? stack.final_norm->const_data_ptr<T>() : nullptr),
        stream_{stream.mutable_data_ptr<T>(), s_.hidden},
        layers_(stack.layers<T>()) {
    take_scratch(stream.scalar_type());
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Tensor layer_keys = keys.select(0, first_layer + i), layer_values = values.select(0, first_layer + i);
      stores_.push_back({layer_keys.mutable_data_ptr<T>(), layer_values.mutable_data_ptr<T>()});
      attention_.push_back(attention_of(layers_[i].window, batch, layer_keys, layer_values));
    }
    plan_ = plan_attention(attention_[0], batch.tree_base.size(0));
  }

  // hidden: what the first layer's attention reads; without data: the stream, normed if that layer has a norm.
  // out: [tokens, hidden]. taps[i]: where to copy the stream that leaves layer i, or null.
  void run(Matrix<const T> hidden, Matrix<T> out, const std::vector<T*>& taps) {
    Team team;
    const auto work = [&](int64_t rank, int64_t size) {
      Worker worker(team, rank, size);
      run_layers(worker, hidden, out, taps);
    };
    const int64_t threads = threads_for(cost());
    if (threads == 1) return work(0, 1);
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
  }

 private:
  void take_scratch(at::ScalarType dtype) {
    const int64_t heads = s_.head_rows() * s_.head_dim, attended = s_.heads * s_.head_dim;
    scratch_ = empty({tokens_ * (heads + attended + 3 * s_.mlp + 2 * s_.hidden)}, dtype);
    T* free = scratch_.mutable_data_ptr<T>();
    const auto take = [&](int64_t width) { return Matrix<T>{std::exchange(free, free + tokens_ * width), width}; };
    heads_ = take(heads);
    attended_ = take(attended);
    gate_up_ = take(2 * s_.mlp);
    gated_ = take(s_.mlp);
    normed_ = take(s_.hidden);
    added_ = take(s_.hidden);
  }

  AttentionProblem<T> attention_of(int64_t window, const Batch& batch, const Tensor& keys, const Tensor& values) const {
    return {heads_.data,
            keys.const_data_ptr<T>(),
            values.const_data_ptr<T>(),
            attended_.data,
            nullptr,
            batch.visible.const_data_ptr<int32_t>(),
            batch.row_starts.const_data_ptr<int32_t>(),
            batch.tree_base.const_data_ptr<int32_t>(),
            batch.page_table.const_data_ptr<int32_t>(),
            batch.tree_mask.const_data_ptr<int64_t>(),
            positions_,
            heads_.stride,
            s_.head_dim,
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            batch.page_table.size(1),
            s_.heads,
            s_.kv_heads,
            s_.heads / s_.kv_heads,
            s_.head_dim,
            s_.head_dim,
            s_.scale,
            s_.soft_cap,
            window,
            s_.first_key};
  }

  int64_t cost() const {
    int64_t total = plan_.cost * static_cast<int64_t>(layers_.size());
    for (const Layer<T>& layer : layers_)
      for (const auto* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) total += (*linear)->cost(tokens_);
    return total;
  }

  // What follows runs on every thread of the team.

  void run_layers(Worker& worker, Matrix<const T> hidden, Matrix<T> out, const std::vector<T*>& taps) {
    if (!hidden.data) {
      each_row(worker, [&](int64_t token) { norm(layers_[0].input_norm, normed_, token); });
      hidden = layers_[0].input_norm ? as_input(normed_) : as_input(stream_);
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer<T>& layer = layers_[i];
      const bool last = i + 1 == layers_.size();
      const T* next_norm = last ? final_norm_ : layers_[i + 1].input_norm;
      attend(worker, i, hidden);
      add_to_stream(worker, *layer.o, attended_, nullptr, layer.mlp_norm, normed_);
      multiply(worker, *layer.gate_up, as_input(normed_), gate_up_);
      gate(worker);
      add_to_stream(worker, *layer.down, gated_, taps[i], next_norm, last ? out : normed_);
      hidden = next_norm ? as_input(normed_) : as_input(stream_);
    }
  }

  void attend(Worker& worker, size_t i, Matrix<const T> hidden) {
    multiply(worker, *layers_[i].qkv, hidden, heads_);
    each_row(worker, [&](int64_t token) { place(i, token); });
    worker.take(plan_.tasks.size(), [&](int64_t task) { run_attention(attention_[i], plan_.tasks[task]); });
  }

  // Norms and rotates one token's queries and keys, and stores its keys and values.
  void place(size_t i, int64_t token) {
    const Layer<T>& layer = layers_[i];
    const AttentionProblem<T>& to = attention_[i];
    const float* cos = rope_ + positions_[token] * 2 * half_;
    const int64_t dim = s_.head_dim;
    T* head = heads_.row(token);
    for (int64_t h = 0; h < s_.heads; ++h, head += dim) {
      if (layer.q_norm) norm_row(head, layer.q_norm, s_.eps, dim, head);
      rotate_head(head, cos, cos + half_, half_, dim, head);
    }
    T* key = stores_[i].keys + slots_[token] * to.key_slot;
    for (int64_t h = 0; h < s_.kv_heads; ++h, head += dim, key += to.key_head) {
      if (layer.k_norm) norm_row(head, layer.k_norm, s_.eps, dim, head);
      rotate_head(head, cos, cos + half_, half_, dim, key);
    }
    T* value = stores_[i].values + slots_[token] * to.value_slot;
    for (int64_t h = 0; h < s_.kv_heads; ++h, head += dim, value += to.value_head) std::copy_n(head, dim, value);
  }

  // stream += x W^T + b; a copy goes to `tap`, if there is one, and normed, if there is a norm, to `normed`.
  void add_to_stream(Worker& worker, const BlockLinear<T>& linear, Matrix<T> x, T* tap, const T* weight, Matrix<T> normed) {
    multiply(worker, linear, as_input(x), added_);
    each_row(worker, [&](int64_t token) {
      add_row(added_.row(token), stream_.row(token), s_.hidden);
      if (tap) std::copy_n(stream_.row(token), s_.hidden, tap + token * s_.hidden);
      norm(weight, normed, token);
    });
  }

  void norm(const T* weight, Matrix<T> to, int64_t token) {
    if (weight) norm_row(stream_.row(token), weight, s_.eps, s_.hidden, to.row(token));
  }

  void gate(Worker& worker) {
    const int64_t pieces = ceil_div(s_.mlp, kPiece);  // so that threads can share one token
    worker.share(tokens_ * pieces, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = i / pieces, from = i % pieces * kPiece;
        const T* row = gate_up_.row(token) + from;
        gated_row(row, row + s_.mlp, s_.activation, std::min(kPiece, s_.mlp - from), gated_.row(token) + from);
      }
    });
  }

  void multiply(Worker& worker, const BlockLinear<T>& linear, Matrix<const T> x, Matrix<T> out) {
    worker.share(linear.blocks(), [&](int64_t first, int64_t last) {
      linear.multiply(x.data, x.stride, tokens_, out.data, out.stride, first, last);
    });
  }

  template <typename Body>
  void each_row(Worker& worker, const Body& body) {
    worker.share(tokens_, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) body(token);
    });
  }

  static constexpr int64_t kPiece = 32 * kLanes;

  struct Store {
    T *keys, *values;
  };

  const Shape s_;
  const int64_t tokens_, half_;
  const float* rope_;
  const int64_t *positions_, *slots_;
  const T* final_norm_;
  const Matrix<T> stream_;
  const std::vector<Layer<T>>& layers_;
  Tensor scratch_;
  Matrix<T> heads_, attended_, gate_up_, gated_, normed_, added_;
  std::vector<Store> stores_;  // the layers' parts of the cache
  std::vector<AttentionProblem<T>> attention_;
  AttentionPlan plan_;
};

void check(const LayerStack& stack, const std::optional<Tensor>& hidden, const Tensor& stream, const Tensor& out,
           const Batch& batch, const Tensor& keys, const Tensor& values, int64_t first_layer) {
  const Shape& s = stack.shape;
  const int64_t tokens = stream.size(0), end = first_layer + static_cast<int64_t>(stack.owned.size());
  TORCH_CHECK(first_layer >= 0 && first_layer < end, "run_layers: no layers, or a negative one");
  TORCH_CHECK(stream.scalar_type() == stack.dtype, "run_layers: the stream is ", stream.scalar_type(), ", the layers are ",
              stack.dtype);
  TORCH_CHECK(stream.is_contiguous() && stream.dim() == 2 && stream.size(1) == s.hidden && out.is_contiguous() &&
                  out.sizes() == stream.sizes(),
              "run_layers: stream and out must be [T, ", s.hidden, "] and contiguous");
  TORCH_CHECK(!hidden || (hidden->dim() == 2 && hidden->size(0) == tokens && hidden->stride(1) == 1 &&
                          hidden->size(1) == stack.inputs),
              "run_layers: hidden must be [T, ", stack.inputs, "] with a dense last dim");
  for (const Tensor& cache : {keys, values})
    TORCH_CHECK(cache.dim() == 4 && cache.size(0) >= end && cache.size(1) % kLanes == 0 && cache.size(2) == s.kv_heads &&
                    cache.size(3) == s.head_dim && cache.stride(3) == 1,
                "run_layers: keys and values must be [", end, " or more, slots, ", s.kv_heads, ", ", s.head_dim, "]");
  const int64_t *position = index_data<int64_t>(batch.positions, "positions"), *slot = index_data<int64_t>(batch.slots, "slots");
  TORCH_CHECK(batch.positions.numel() == tokens && batch.slots.numel() == tokens && batch.visible.numel() == tokens &&
                  batch.tree_mask.numel() == tokens && batch.row_starts.numel() == batch.tree_base.numel() + 1 &&
                  batch.page_table.size(0) == batch.tree_base.numel() && batch.page_table.is_contiguous() &&
                  batch.visible.is_contiguous() && batch.tree_mask.is_contiguous(),
              "run_layers: the batch's tensors do not fit together");
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK_INDEX(position[t] >= 0 && position[t] < stack.rope.size(0) && slot[t] >= 0 && slot[t] < keys.size(1),
                      "run_layers: token ", t, " has position ", position[t], " of ", stack.rope.size(0), " and slot ",
                      slot[t], " of ", keys.size(1));
}

template <typename T>
std::vector<Tensor> run_typed(const LayerStack& stack, const std::optional<Tensor>& hidden, const Tensor& stream,
                              const Tensor& out, const Batch& batch, const Tensor& keys, const Tensor& values,
                              int64_t first_layer, at::IntArrayRef taps) {
  std::vector<Tensor> kept;
  std::vector<T*> to(stack.owned.size(), nullptr);
  for (const int64_t tap : taps) {
    kept.push_back(empty(stream.sizes(), stream.scalar_type()));
    to.at(tap - 1) = kept.back().mutable_data_ptr<T>();
  }
  Pass<T> pass(stack, batch, keys, values, first_layer, stream);
  pass.run({hidden ? hidden->const_data_ptr<T>() : nullptr, hidden ? hidden->stride(0) : 0},
           {out.mutable_data_ptr<T>(), out.size(1)}, to);
  return kept;
}

// hidden [T, I]: what the first layer's attention reads; default: the stream, normed if that layer has a norm.
// stream [T, H] becomes the stream after the last layer, and out [T, H] its norm; without a final norm out is not
// written. keys, values [L, S, Hkv, D]: of the whole cache, in which the stack's first layer is `first_layer`. Returns
// copies of the stream, [T, H] each, after the layers `taps`, counted from 1.
std::vector<Tensor> run_layers(const c10::intrusive_ptr<LayerStack>& stack, const std::optional<Tensor>& hidden,
                               const Tensor& stream, const Tensor& out, const Tensor& positions, const Tensor& slots,
                               const Tensor& visible, const Tensor& tree_mask, const Tensor& row_starts,
                               const Tensor& tree_base, const Tensor& page_table, const Tensor& keys, const Tensor& values,
                               int64_t first_layer, at::IntArrayRef taps) {
  const Batch batch{positions, slots, visible, tree_mask, row_starts, tree_base, page_table};
  check(*stack, hidden, stream, out, batch, keys, values, first_layer);
  return stream.scalar_type() == at::kBFloat16
             ? run_typed<c10::BFloat16>(*stack, hidden, stream, out, batch, keys, values, first_layer, taps)
             : run_typed<float>(*stack, hidden, stream, out, batch, keys, values, first_layer, taps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.class_<LayerStack>("LayerStack")
      .def(torch::init<Tensor, std::optional<Tensor>, std::vector<int64_t>, int64_t, int64_t, double, double, double>())
      .def("add_layer", &LayerStack::add_layer);
  m.def(
      "run_layers(__torch__.torch.classes.saccade.LayerStack stack, Tensor? hidden, Tensor(a!) stream, Tensor(b!) out, "
      "Tensor positions, Tensor slots, Tensor visible, Tensor tree_mask, Tensor row_starts, Tensor tree_base, "
      "Tensor page_table, Tensor(c!) keys, Tensor(d!) values, int first_layer, int[] taps) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("run_layers", &run_layers); }

}  // namespace saccade
