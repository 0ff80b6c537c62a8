// The parts of a transformer block on one new token of each of a few sequences, as in decoding:
// norm, projections, attention over a cache, feed-forward block and residual sum, each in one call.
//
// Weights and what passes from part to part are of type T; sums are in fp32, and results are rounded
// to T wherever the same computation by torch's operators rounds them.
//
// Shapes: B sequences, D width of the residual stream, H query heads, G key-value heads, C width of
// a head, R numbers of it that are turned, L positions in the cache, P positions in the tables of
// angles, F hidden width, V rows of the head. Mixtures have a file of their own.

#include <limits>

#include "dense_block.h"
#include "residual.h"

namespace moezoo {
namespace {

// Turns two halves by a position's angles; the first half of sin is negative.
template <class T>
void turn(float* head, const T* cos, const T* sin, int64_t width) {
  const int64_t half = width / 2;
  by_registers(half, [&](int64_t c, auto lanes) {
    const Floats low = load(head + c, lanes), high = load(head + half + c, lanes);
    const auto turned = [&](Floats own, Floats other, int64_t at) {
      return rounded<T>(rounded<T>(own * load(cos + at, lanes)) +
                        rounded<T>(other * load(sin + at, lanes)));
    };
    store(head + c, turned(low, high, c), lanes);
    store(head + half + c, turned(high, low, half + c), lanes);
  });
}

// scores (length,) = scale keys q.
template <class T>
void score(const float* query, const T* keys, int64_t length, int64_t width, float scale,
           float* scores) {
  Totals<float> totals;
  for (int64_t p = 0; p < length; ++p) {
    const T* key = keys + p * width;
    Floats sum{};
    by_registers(width, [&](int64_t c, auto lanes) {
      sum += load(query + c, lanes) * load(key + c, lanes);
    });
    totals.add(sum * scale, 0.0f, scores + p);
  }
  totals.flush();
}

// scores become weights before their division by the sum, which is returned.
float soften(const uint8_t* real, int64_t length, float* scores) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  float most = kHidden;
  for (int64_t p = 0; p < length; ++p) {
    if (real && !real[p]) scores[p] = kHidden;
    most = std::max(most, scores[p]);
  }
  Floats total{};
  by_registers(length, [&](int64_t p, auto lanes) {
    store(scores + p, exponential(load(scores + p, lanes) - most), lanes);
  });
  if (real)
    for (int64_t p = 0; p < length; ++p)
      if (!real[p]) scores[p] = 0.0f;
  by_registers(length, [&](int64_t p, auto lanes) { total += load(scores + p, lanes); });
  return sum(total);
}

// out (C,) = Σ weights[p] values[p] / total.
template <class T>
void mix(const float* weights, const T* values, int64_t length, int64_t width, float total,
         float* out) {
  constexpr int kAtOnce = 4;
  const auto columns = [&](int64_t c, auto count, auto lanes) {
    Floats sums[count()] = {};
    for (int64_t p = 0; p < length; ++p) {
      const T* row = values + p * width + c;
      for (int i = 0; i < count(); ++i) sums[i] += weights[p] * load(row + i * kLanes, lanes);
    }
    for (int i = 0; i < count(); ++i)
      store(out + c + i * kLanes, rounded<T>(sums[i] / total), lanes);
  };
  int64_t c = 0;
  for (; c + kAtOnce * kLanes <= width; c += kAtOnce * kLanes)
    columns(c, std::integral_constant<int, kAtOnce>{}, Full{});
  by_registers(width - c, [&](int64_t rest, auto lanes) {
    columns(c + rest, std::integral_constant<int, 1>{}, lanes);
  });
}

template <class T>
struct Attention {
  const T* norm;
  Matrix<T> query, key, value, out;
  const T *query_norm, *key_norm;  // (C,), or (H C,) and (G C,) over all heads; or null
  const T *cos, *sin;              // (P, R)
  const int64_t* places;           // (B,)
  T *keys, *values;                // (B, G, L, C)
  const uint8_t* mask;             // (B, L) or null
  int64_t tokens, width, heads, kv_heads, head_width, turned, room, window;  // window 0: none
  bool norms_all;                  // over all heads
  float eps, scale;

  // The new token's queries, turned in place, and its key and value, into the cache at that place.
  void place(float* states, int64_t token, int64_t at) const {
    const int64_t angles = places[token] * turned;
    if (query_norm && norms_all) {
      float* first_key = states + heads * head_width;
      normalize(states, query_norm, eps, heads * head_width, states);
      normalize(first_key, key_norm, eps, kv_heads * head_width, first_key);
    }
    for (int64_t h = 0; h < heads + kv_heads; ++h) {
      float* head = states + h * head_width;
      const T* weight = h < heads ? query_norm : key_norm;
      if (weight && !norms_all) normalize(head, weight, eps, head_width, head);
      turn(head, cos + angles, sin + angles, turned);
    }
    for (int64_t g = 0; g < kv_heads; ++g) {
      const int64_t to = ((token * kv_heads + g) * room + at) * head_width;
      convert_row(states + (heads + g) * head_width, keys + to, head_width);
      convert_row(states + (heads + kv_heads + g) * head_width, values + to, head_width);
    }
  }

  void attend(const float* states, int64_t token, int64_t group, int64_t first, int64_t length,
              float* scores, float* attended) const {
    const int64_t from = ((token * kv_heads + group) * room + first) * head_width;
    const uint8_t* real = mask ? mask + token * room + first : nullptr;
    const int64_t queries = heads / kv_heads;
    for (int64_t h = group * queries; h < (group + 1) * queries; ++h) {
      score(states + h * head_width, keys + from, length, head_width, scale, scores);
      const float total = soften(real, length, scores);
      mix(scores, values + from, length, head_width, total, attended + h * head_width);
    }
  }

  void step(int64_t at, float* scratch, T* residual, int32_t threads) const {
    const int64_t inner = (heads + 2 * kv_heads) * head_width, answers = heads * head_width;
    float* normed = scratch;
    float* states = normed + tokens * width;
    float* attended = states + tokens * inner;
    normalize_all(residual, norm, eps, tokens, width, normed);
    multiply_parts<T>({query, key, value}, normed, tokens, states, threads);
    for (int64_t t = 0; t < tokens; ++t) place(states + t * inner, t, at);
    const int64_t first = window ? std::max<int64_t>(0, at + 1 - window) : 0;
    const int64_t length = at + 1 - first;
    const int64_t grain = least_rows(2 * length * head_width, heads / kv_heads);
    parallel_ranges(tokens * kv_heads, grain, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> scores(length);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / kv_heads;
        attend(states + t * inner, t, i % kv_heads, first, length, scores.data(),
               attended + t * answers);
      }
    });
    multiply_parts<T>({out}, attended, tokens, normed, threads);
    add_answers(normed, tokens * width, residual);
  }
};

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// residual (B, D) += attention's answer. scratch holds B (D + (H + 2 G) C + H C) floats.
MOEZOO_API void moezoo_attention_step(
    int64_t at, void* residual, const void* norm, const void* w_query, const void* w_key,
    const void* w_value, const void* w_out, const void* b_query, const void* b_key,
    const void* b_value, const void* b_out, const void* query_norm, const void* key_norm,
    const void* cos, const void* sin, const int64_t* places, void* keys, void* values,
    const uint8_t* mask, float* scratch, int64_t dtype, int64_t tokens, int64_t width,
    int64_t heads, int64_t kv_heads, int64_t head_width, int64_t turned, int64_t room,
    int64_t window, int64_t norms_all, double eps, double scale, int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto matrix = [](const void* weight, const void* bias, int64_t rows, int64_t columns) {
      return Matrix<T>{static_cast<const T*>(weight), static_cast<const T*>(bias), rows, columns};
    };
    const auto typed = [](const void* data) { return static_cast<const T*>(data); };
    const int64_t queries = heads * head_width, pairs = kv_heads * head_width;
    const Attention<T> attention{typed(norm),
                                 matrix(w_query, b_query, queries, width),
                                 matrix(w_key, b_key, pairs, width),
                                 matrix(w_value, b_value, pairs, width),
                                 matrix(w_out, b_out, width, queries),
                                 typed(query_norm),
                                 typed(key_norm),
                                 typed(cos),
                                 typed(sin),
                                 places,
                                 static_cast<T*>(keys),
                                 static_cast<T*>(values),
                                 mask,
                                 tokens,
                                 width,
                                 heads,
                                 kv_heads,
                                 head_width,
                                 turned,
                                 room,
                                 window,
                                 norms_all != 0,
                                 static_cast<float>(eps),
                                 static_cast<float>(scale)};
    attention.step(at, scratch, static_cast<T*>(residual), threads);
  });
}

// residual (B, D) += the answer of a dense block to norm(read); read is the residual itself if it
// is null. w_gate is null if the block is not gated. scratch holds B (D + 3 F) floats.
MOEZOO_API void moezoo_dense_step(void* residual, const void* read, const void* norm,
                                  const void* w_gate, const void* w_up, const void* w_down,
                                  const void* b_gate, const void* b_up, const void* b_down,
                                  float* scratch, int64_t dtype, int64_t tokens, int64_t width,
                                  int64_t hidden_width, int64_t activation, int64_t bound,
                                  double gate_bound, double up_bound, double shift, double eps,
                                  int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto typed = [](const void* data) { return static_cast<const T*>(data); };
    float* normed = scratch;
    float* hidden = normed + tokens * width;
    float* inner = hidden + tokens * hidden_width;
    normalize_all(typed(read ? read : residual), typed(norm), static_cast<float>(eps), tokens,
                  width, normed);
    const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                  static_cast<float>(shift), false};
    const DenseBlock<T> block{{typed(w_gate), typed(b_gate), hidden_width, width},
                              {typed(w_up), typed(b_up), hidden_width, width},
                              {typed(w_down), typed(b_down), width, hidden_width},
                              activation,
                              glu};
    block.hide(normed, tokens, inner, hidden, threads);
    block.answer(hidden, tokens, normed, threads);
    add_answers(normed, tokens * width, static_cast<T*>(residual));
  });
}

// logits (B, V) = W norm(residual) + b. scratch holds B (D + V) floats.
MOEZOO_API void moezoo_head_step(void* logits, const void* residual, const void* norm,
                                 const void* weight, const void* bias, float* scratch,
                                 int64_t dtype, int64_t tokens, int64_t width, int64_t rows,
                                 double eps, int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto typed = [](const void* data) { return static_cast<const T*>(data); };
    float* found = scratch + tokens * width;
    normalize_all(typed(residual), typed(norm), static_cast<float>(eps), tokens, width, scratch);
    multiply_parts<T>({Matrix<T>{typed(weight), typed(bias), rows, width}}, scratch, tokens, found,
                      threads);
    convert_row(found, static_cast<T*>(logits), tokens * rows);
  });
}
