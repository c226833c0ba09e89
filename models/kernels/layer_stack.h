// What layer_stack.cpp runs: the layers of a stack, checked and typed once.
#pragma once

#include <torch/custom_class.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "block_linear.h"

namespace saccade {

using Weights = c10::Dict<std::string, at::Tensor>;

// What all layers of a stack have in common.
struct Shape {
  int64_t heads, kv_heads, head_dim, hidden, mlp, activation, first_key;
  float eps, scale, soft_cap;  // soft_cap 0: none

  int64_t head_rows() const { return heads + 2 * kv_heads; }  // heads of the fused projection
};

// One layer's weights, which it borrows.
template <typename T>
struct Layer {
  using Linear = std::unique_ptr<BlockLinear<T>>;

  Layer(const Weights& weights, const Shape& s, int64_t inputs, int64_t window)
      : input_norm(norm(weights, "input_norm", s.hidden)),
        mlp_norm(norm(weights, "mlp_norm", s.hidden)),
        q_norm(norm(weights, "q_norm", s.head_dim)),
        k_norm(norm(weights, "k_norm", s.head_dim)),
        qkv(linear(weights, "qkv", inputs, s.head_rows() * s.head_dim)),
        o(linear(weights, "o", s.heads * s.head_dim, s.hidden)),
        gate_up(linear(weights, "gate_up", s.hidden, 2 * s.mlp)),
        down(linear(weights, "down", s.mlp, s.hidden)),
        window(window) {
    TORCH_CHECK(mlp_norm, "add_layer: mlp_norm.weight is missing");
  }

  const T *input_norm, *mlp_norm, *q_norm, *k_norm;  // null: none
  Linear qkv, o, gate_up, down;
  int64_t window;  // 0: none

 private:
  static std::optional<at::Tensor> find(const Weights& weights, const std::string& name) {
    return weights.contains(name) ? std::optional(weights.at(name)) : std::nullopt;
  }
  static const T* norm(const Weights& weights, const std::string& name, int64_t size) {
    const auto found = find(weights, name + ".weight");
    TORCH_CHECK(!found || (found->numel() == size && found->is_contiguous()), "add_layer: ", name, " must be [", size, "]");
    return found ? found->const_data_ptr<T>() : nullptr;
  }
  static Linear linear(const Weights& weights, const std::string& name, int64_t inputs, int64_t outputs) {
    const at::Tensor weight = weights.at(name + ".weight");
    const auto bias = find(weights, name + ".bias"), scale = find(weights, name + ".scale");
    return scale ? int8_linear_of<T>(weight, *scale, bias, inputs, outputs)
                 : packed_linear_of<T>(weight, bias, inputs, outputs);
  }
};

struct LayerStack : torch::CustomClassHolder {
  // rope: [positions, 2, rot / 2]. sizes: heads, kv_heads, head_dim, hidden, mlp. soft_cap 0: none.
  LayerStack(at::Tensor rope, std::optional<at::Tensor> final_norm, std::vector<int64_t> sizes, int64_t activation,
             int64_t first_key, double eps, double scale, double soft_cap)
      : rope(std::move(rope)), final_norm(std::move(final_norm)) {
    TORCH_CHECK(sizes.size() == 5, "LayerStack: sizes are heads, kv_heads, head_dim, hidden and mlp");
    shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], activation, first_key, static_cast<float>(eps),
             static_cast<float>(scale), static_cast<float>(soft_cap)};
  }

  // weights: as DecoderLayer.weights names them, but qkv, o, gate_up and down fused and packed; with ".scale", by
  // int8_pack. inputs: of qkv. window 0: none.
  void add_layer(Weights weights, int64_t inputs, int64_t window) {
    if (owned.empty()) this->inputs = inputs;
    dtype = weights.at("mlp_norm.weight").scalar_type();
    if (dtype == at::kBFloat16)
      in_bfloat16.emplace_back(weights, shape, inputs, window);
    else
      in_float32.emplace_back(weights, shape, inputs, window);
    owned.push_back(std::move(weights));
  }

  template <typename T>
  const std::vector<Layer<T>>& layers() const {
    if constexpr (std::is_same_v<T, c10::BFloat16>)
      return in_bfloat16;
    else
      return in_float32;
  }

  at::Tensor rope;
  std::optional<at::Tensor> final_norm;
  Shape shape;
  int64_t inputs = 0;  // of the first layer's attention
  at::ScalarType dtype = at::kFloat;
  std::vector<Layer<float>> in_float32;
  std::vector<Layer<c10::BFloat16>> in_bfloat16;  // of the two, one is empty
  std::vector<Weights> owned;                     // what the layers borrow
};

}  // namespace saccade
