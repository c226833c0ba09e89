// The element-wise operations of a decoder layer (models/layers/ops.py), fused. Arithmetic is float32, or float64 for
// float64 tensors; a row's result does not depend on the other rows.
#include <optional>

#include "layer_rows.h"
#include "tensors.h"

namespace saccade {

template <typename T, typename W>
[[gnu::noinline]] void norm_row(const T* x, const W* weight, acc_t<T> eps, int64_t width, T* out) {
  using A = acc_t<T>;
  vec_t<A> squares[2] = {};
  for (int64_t d = 0, i = 0; d < width; d += kLanes, i ^= 1) {
    const vec_t<A> lanes = load_upto<T>(x + d, width - d);
    squares[i] += lanes * lanes;
  }
  const A factor = 1 / std::sqrt(sum<A>(squares[0] + squares[1]) / width + eps);
  for (int64_t d = 0; d < width; d += kLanes) {
    const vec_t<A> scale = [&] {
      if constexpr (std::is_same_v<acc_t<W>, A>) return load_upto<W>(weight + d, width - d);
    }();
    store_upto<T>(out + d, load_upto<T>(x + d, width - d) * factor * scale, width - d);
  }
}

template <typename T>
[[gnu::noinline]] void add_row(const T* added, T* stream, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes)
    store_upto<T>(stream + d, load_upto<T>(stream + d, width - d) + load_upto<T>(added + d, width - d), width - d);
}

template <typename T>
[[gnu::noinline]] void rotate_head(const T* x, const acc_t<T>* cos, const acc_t<T>* sin, int64_t half, int64_t dims, T* out) {
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t left = half - d;
    const auto first = load_upto<T>(x + d, left), second = load_upto<T>(x + half + d, left);
    const auto c = load_upto(cos + d, left), s = load_upto(sin + d, left);
    store_upto<T>(out + d, first * c - second * s, left);
    store_upto<T>(out + half + d, second * c + first * s, left);
  }
  if (out != x) std::copy(x + 2 * half, x + dims, out + 2 * half);
}

namespace {

template <typename A>
vec_t<A> activate(vec_t<A> x, int64_t activation) {
  using V = vec_t<A>;
  if (activation == kSilu) return x / (1 + exp(-x));
  if (activation == kGeluTanh) {  // 0.5 x (1 + tanh u) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const V u = static_cast<A>(0.7978845608028654) * (x + static_cast<A>(0.044715) * x * x * x);
    return x / (1 + exp(-2 * u));
  }
  for (int i = 0; i < kLanes; ++i) x[i] = x[i] * std::erfc(-x[i] * static_cast<A>(0.7071067811865476)) / 2;
  return x;
}

}  // namespace

template <typename T>
[[gnu::noinline]] void gated_row(const T* gate, const T* up, int64_t activation, int64_t width, T* out) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const auto lanes = activate<acc_t<T>>(load_upto<T>(gate + d, width - d), activation);
    store_upto<T>(out + d, lanes * load_upto<T>(up + d, width - d), width - d);
  }
}

template void norm_row(const float*, const float*, float, int64_t, float*);
template void add_row(const float*, float*, int64_t);
template void rotate_head(const float*, const float*, const float*, int64_t, int64_t, float*);
template void gated_row(const float*, const float*, int64_t, int64_t, float*);
template void norm_row(const c10::BFloat16*, const c10::BFloat16*, float, int64_t, c10::BFloat16*);
template void add_row(const c10::BFloat16*, c10::BFloat16*, int64_t);
template void rotate_head(const c10::BFloat16*, const float*, const float*, int64_t, int64_t, c10::BFloat16*);
template void gated_row(const c10::BFloat16*, const c10::BFloat16*, int64_t, int64_t, c10::BFloat16*);

namespace {

// The rows of a tensor [..., H] whose last dim is dense: up to two leading dims with any strides, so that a view of a
// fused projection needs no copy.
struct Rows {
  int64_t count, width, inner, outer_stride, inner_stride;

  explicit Rows(const at::Tensor& x) : count(1), width(x.size(-1)), inner(1), outer_stride(0), inner_stride(0) {
    TORCH_CHECK(x.dim() >= 1 && x.dim() <= 3 && x.stride(-1) == 1, "expected 1 to 3 dims, the last one dense");
    for (int64_t i = 0; i < x.dim() - 1; ++i) count *= x.size(i);
    if (x.dim() == 2) outer_stride = x.stride(0);
    if (x.dim() == 3) {
      inner = std::max<int64_t>(x.size(1), 1);
      outer_stride = x.stride(0);
      inner_stride = x.stride(1);
    }
  }
  int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

// Calls body(T{}, W{}): weights have the type of x or that of the arithmetic.
template <typename Body>
void for_weighted(const at::Tensor& x, const at::Tensor& weight, const char* op, Body body) {
  TORCH_CHECK(weight.is_contiguous() && weight.numel() == x.size(-1), op, ": weight must be [", x.size(-1), "]");
  for_floating(x.scalar_type(), op, [&](auto type) {
    using T = decltype(type);
    if (weight.scalar_type() == x.scalar_type()) return body(T{}, T{});
    TORCH_CHECK(weight.scalar_type() == c10::CppTypeToScalarType<acc_t<T>>::value, op, ": weight is ",
                weight.scalar_type(), " and x ", x.scalar_type());
    body(T{}, acc_t<T>{});
  });
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const Rows rows(x);
  at::Tensor out = empty(x.sizes(), x.scalar_type());
  for_weighted(x, weight, "rms_norm", [&](auto type, auto weight_type) {
    using T = decltype(type);
    using W = decltype(weight_type);
    const T* from = x.const_data_ptr<T>();
    const W* scale = weight.const_data_ptr<W>();
    T* to = out.mutable_data_ptr<T>();
    parallel_tasks(rows.count, rows.count * rows.width / 8, [&](int64_t row) {
      norm_row<T, W>(from + rows.offset(row), scale, eps, rows.width, to + row * rows.width);
    });
  });
  return out;
}

at::Tensor add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  const Rows rows(x), sums(residual);
  TORCH_CHECK(x.sizes() == residual.sizes() && x.scalar_type() == residual.scalar_type(),
              "add_rms_norm: x and residual differ in shape or dtype");
  at::Tensor out = empty(x.sizes(), x.scalar_type());
  for_weighted(x, weight, "add_rms_norm", [&](auto type, auto weight_type) {
    using T = decltype(type);
    using W = decltype(weight_type);
    const T* from = x.const_data_ptr<T>();
    T* total = residual.mutable_data_ptr<T>();
    const W* scale = weight.const_data_ptr<W>();
    T* to = out.mutable_data_ptr<T>();
    parallel_tasks(rows.count, rows.count * rows.width / 6, [&](int64_t row) {
      T* stream = total + sums.offset(row);
      add_row<T>(from + rows.offset(row), stream, rows.width);
      norm_row<T, W>(stream, scale, eps, rows.width, to + row * rows.width);
    });
  });
  return out;
}

at::Tensor rotate_and_store(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& rope,
                            const at::Tensor& positions, const at::Tensor& slots, const at::Tensor& keys,
                            const at::Tensor& values) {
  const int64_t tokens = query.size(0), heads = query.size(1), kv_heads = key.size(1);
  const int64_t dims = query.size(2), value_dims = value.size(2), half = rope.size(2), length = rope.size(0);
  TORCH_CHECK(query.stride(2) == 1 && key.stride(2) == 1 && value.stride(2) == 1 && keys.stride(2) == 1 &&
                  values.stride(2) == 1 && rope.is_contiguous(),
              "rotate_and_store: the last dims must be dense");
  TORCH_CHECK(key.size(0) == tokens && value.size(0) == tokens && positions.numel() == tokens && slots.numel() == tokens &&
                  key.size(2) == dims && value.size(1) == kv_heads && 2 * half <= dims && keys.size(1) == kv_heads &&
                  keys.size(2) == dims && values.size(1) == kv_heads && values.size(2) == value_dims,
              "rotate_and_store: the shapes do not fit together");
  at::Tensor out = empty({tokens, heads, dims}, query.scalar_type());
  const int64_t* position = index_data<int64_t>(positions, "positions");
  const int64_t* slot = index_data<int64_t>(slots, "slots");
  const int64_t last_slot = std::min(keys.size(0), values.size(0));
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK_INDEX(position[t] >= 0 && position[t] < length && slot[t] >= 0 && slot[t] < last_slot,
                      "rotate_and_store: token ", t, " has position ", position[t], " of ", length, " and slot ", slot[t],
                      " of ", last_slot);
  for_floating(query.scalar_type(), "rotate_and_store", [&](auto type) {
    using T = decltype(type);
    const T *q = query.const_data_ptr<T>(), *k = key.const_data_ptr<T>(), *v = value.const_data_ptr<T>();
    const acc_t<T>* table = rope.const_data_ptr<acc_t<T>>();
    T *to = out.mutable_data_ptr<T>(), *key_cache = keys.mutable_data_ptr<T>(), *value_cache = values.mutable_data_ptr<T>();
    parallel_tasks(tokens, tokens * ((heads + kv_heads) * dims + kv_heads * value_dims) / 8, [&](int64_t t) {
      const acc_t<T>* cos = table + position[t] * 2 * half;
      for (int64_t h = 0; h < heads; ++h)
        rotate_head<T>(q + t * query.stride(0) + h * query.stride(1), cos, cos + half, half, dims, to + (t * heads + h) * dims);
      for (int64_t h = 0; h < kv_heads; ++h) {
        rotate_head<T>(k + t * key.stride(0) + h * key.stride(1), cos, cos + half, half, dims,
                       key_cache + slot[t] * keys.stride(0) + h * keys.stride(1));
        const T* from = v + t * value.stride(0) + h * value.stride(1);
        std::copy(from, from + value_dims, value_cache + slot[t] * values.stride(0) + h * values.stride(1));
      }
    });
  });
  return out;
}

at::Tensor gated(const at::Tensor& gate_up, int64_t activation) {
  const Rows rows(gate_up);
  TORCH_CHECK(gate_up.dim() == 2 && rows.width % 2 == 0, "gated: expected [T, 2F]");
  TORCH_CHECK(activation >= kSilu && activation <= kGeluTanh, "gated: no activation ", activation);
  const int64_t width = rows.width / 2;
  at::Tensor out = empty({rows.count, width}, gate_up.scalar_type());
  for_floating(gate_up.scalar_type(), "gated", [&](auto type) {
    using T = decltype(type);
    const T* from = gate_up.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    parallel_tasks(rows.count, rows.count * width / (activation == kGelu ? 1 : 4), [&](int64_t row) {
      const T* gate = from + rows.offset(row);
      gated_row<T>(gate, gate + width, activation, width, to + row * width);
    });
  });
  return out;
}

}  // namespace saccade
