// A mixture on one new token of each of a few sequences, as in decoding: norm, router, the experts
// that it picks, a block that every token runs, and the residual sum, in one call.
//
// What passes from part to part is rounded to the weights' type T, as torch's operators round it;
// sums, scores and experts' hidden values are in fp32.
//
// Shapes: B sequences, D width, E experts, K choices, F hidden width of an expert, I = 2 F if gated
// else F, S hidden width of the shared block, P width of what the router reads.

#include <cmath>
#include <numeric>

#include "dense_block.h"
#include "residual.h"

extern "C" void moezoo_grouped_mlp_few(const void* x, const void* w_in, const void* w_out,
                                       const void* bias_in, const void* bias_out, int64_t dtype,
                                       const int64_t* indices, const float* weights,
                                       int64_t tokens, int64_t choices, int64_t width,
                                       int64_t hidden_width, int64_t activation, int64_t gated,
                                       int64_t bound, double gate_bound, double up_bound,
                                       double shift, int64_t interleaved,
                                       int64_t transposed, float* inner, float* hidden,
                                       float* output, int32_t threads);

namespace moezoo {
namespace {

// What experts are scored by: linear maps of x, or of x and the sizes of the shared block's hidden
// values; or neurons of their own, in size or with their sign. moe_step.py holds the same list.
enum Scoring : int64_t { kLinear = 0, kWithShared = 1, kNeurons = 2, kSignedNeurons = 3 };

template <class T>
struct Scorer {
  Matrix<T> rows, up;  // (E, P), with biases or none; up's weight is null but for gated neurons
  int64_t scoring, activation;

  // scores (E,) become those of neurons, whose linear factors are in others (E,).
  void fire(const float* others, float* scores) const {
    with_activation(activation, [&](auto act) {
      by_registers(rows.rows, [&](int64_t e, auto lanes) {
        Floats value = activate(act(), load(scores + e, lanes)).value;
        if (up.weight) value *= load(others + e, lanes);
        if (scoring == kNeurons) value = value < 0.0f ? -value : value;
        store(scores + e, value, lanes);
      });
    });
  }

  // scores (B, E) of what is read (B, P); others holds as many floats.
  void score(const float* read, int64_t tokens, float* others, float* scores,
             int32_t threads) const {
    const auto from = rows_of(read, tokens, rows.width);
    const auto multiplied = [&](const Matrix<T>& matrix, float* out) {
      const auto to = rows_of(out, tokens, matrix.rows);
      const int64_t grain = least_rows(matrix.width, tokens);
      parallel_ranges(matrix.rows, grain, threads, [&](int64_t first, int64_t last) {
        multiply<float>(matrix, from.data(), tokens, first, last, to.data());
      });
    };
    multiplied(rows, scores);
    if (scoring != kNeurons && scoring != kSignedNeurons) return;
    if (up.weight) multiplied(up, others);
    for (int64_t t = 0; t < tokens; ++t) fire(others + t * rows.rows, scores + t * rows.rows);
  }
};

struct Choice {
  bool softmax, normalize;
  float factor;
  const float *selection_bias, *scales;  // (E,) or null
  int64_t experts, choices;

  // Turns logits (E,) into indices and weights (K,), the best first. Equal scores, which a softmax
  // may make of different logits, are told apart by these, and equal logits by their numbers.
  void choose(const float* logits, float* scores, int64_t* indices, float* weights) const {
    if (softmax) {
      const float most = *std::max_element(logits, logits + experts);
      float total = 0.0f;
      for (int64_t e = 0; e < experts; ++e) total += scores[e] = std::exp(logits[e] - most);
      for (int64_t e = 0; e < experts; ++e) scores[e] /= total;
    } else {
      for (int64_t e = 0; e < experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    }
    const auto rank = [&](int64_t e) {
      return selection_bias ? scores[e] + selection_bias[e] : scores[e];
    };
    std::vector<int64_t> order(experts);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::partial_sort(order.begin(), order.begin() + choices, order.end(),
                      [&](int64_t a, int64_t b) {
                        const float of_a = rank(a), of_b = rank(b);
                        if (of_a != of_b) return of_a > of_b;
                        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
                      });
    float total = softmax ? 0.0f : 1e-20f;
    for (int64_t k = 0; k < choices; ++k) {
      indices[k] = order[k];
      total += weights[k] = scores[order[k]];
    }
    for (int64_t k = 0; k < choices; ++k) {
      if (normalize) weights[k] /= total;
      weights[k] *= factor;
      if (scales) weights[k] = 1.0f + weights[k] * scales[indices[k]];
    }
  }
};

// seen (B, D + S): what the router reads, beside it the sizes of the shared block's hidden values.
inline void see(const float* read, const float* hidden, int64_t tokens, int64_t width,
                int64_t shared_width, float* seen) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = seen + t * (width + shared_width);
    std::copy(read + t * width, read + (t + 1) * width, row);
    for (int64_t s = 0; s < shared_width; ++s)
      row[width + s] = std::fabs(hidden[t * shared_width + s]);
  }
}

// What both parts answer (B, D), that of the experts rounded as an operator of its own would.
template <class T>
void add_shared(const float* shared, int64_t numbers, float* answer) {
  by_registers(numbers, [&](int64_t c, auto lanes) {
    store(answer + c, rounded<T>(load(answer + c, lanes)) + load(shared + c, lanes), lanes);
  });
}

// shared (B, D) times the sigmoid of a map of x (B, D), rounded as operators of their own would.
template <class T>
void weigh_shared(const Matrix<T>& map, const float* x, int64_t tokens, float* shared) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = x + t * map.width;
    float logit = 0.0f;
    float* out = &logit;
    multiply<T>(map, &row, 1, 0, 1, &out);
    const float weight = rounded<T>(1.0f / (1.0f + std::exp(-logit)));
    float* answer = shared + t * map.width;
    by_registers(map.width, [&](int64_t c, auto lanes) {
      store(answer + c, rounded<T>(weight * load(answer + c, lanes)), lanes);
    });
  }
}

// Parts of one piece of scratch memory.
class Parts {
 public:
  explicit Parts(float* memory) : next_(memory) {}

  float* take(int64_t count) {
    float* part = next_;
    next_ += count;
    return part;
  }

 private:
  float* next_;
};

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// residual (B, D) += the answers of each token's K experts of E and of the shared block, which read
// norm(read), as the router does unless router_x (B, D) is given; read is the residual itself if it
// is null. Experts weigh their scores,
// or, with scales (E,), one more than their score times the scale. The shared block's matrices are
// null if there is none; its output bias may be there all the same. The sigmoid of s_weigh x
// multiplies its answer, unless s_weigh (D,) is null. scratch holds
// B (4 D + 3 E + 4 S) + B K (1 + I + F) floats, typed B D numbers of the dtype, indices B K.
MOEZOO_API void moezoo_moe_step(
    void* residual, const void* read, const void* norm, const void* router_x, const void* w_router,
    const void* w_router_up, const void* b_router, const float* selection_bias,
    const float* scales, const void* w_in, const void* w_out, const void* b_in, const void* b_out,
    const void* s_gate, const void* s_up, const void* s_down, const void* sb_gate,
    const void* sb_up, const void* sb_down, const void* s_weigh, float* scratch, void* typed_x,
    int64_t* indices, int64_t dtype, int64_t tokens, int64_t width, int64_t hidden_width, int64_t experts,
    int64_t choices, int64_t shared_width, int64_t activation, int64_t gated, int64_t bound,
    double gate_bound, double up_bound, double shift, int64_t interleaved, int64_t scoring,
    int64_t softmax, int64_t normalized, double factor, double eps, int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto typed = [](const void* data) { return static_cast<const T*>(data); };
    const auto matrix = [&](const void* weight, const void* bias, int64_t rows, int64_t columns) {
      return Matrix<T>{typed(weight), typed(bias), rows, columns};
    };
    const int64_t slots = tokens * choices, numbers = tokens * width;
    Parts parts(scratch);
    float* normed = parts.take(numbers);
    float* answer = parts.take(numbers);
    float* logits = parts.take(tokens * experts);
    float* scores = parts.take(tokens * experts);
    float* others = parts.take(tokens * experts);
    float* weights = parts.take(slots);
    float* hidden = parts.take(slots * hidden_width);
    float* inner = parts.take(slots * (gated ? 2 : 1) * hidden_width);
    float* shared_hidden = parts.take(tokens * shared_width);
    float* shared_inner = parts.take(2 * tokens * shared_width);
    float* seen = parts.take(tokens * (width + shared_width));
    float* always = parts.take(numbers);

    normalize_all(typed(read ? read : residual), typed(norm), static_cast<float>(eps), tokens,
                  width, normed);
    convert_row(normed, static_cast<T*>(typed_x), numbers);
    const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                  static_cast<float>(shift), false};
    const DenseBlock<T> shared{matrix(s_gate, sb_gate, shared_width, width),
                               matrix(s_up, sb_up, shared_width, width),
                               matrix(s_down, sb_down, width, shared_width), activation, glu};
    if (shared_width) shared.hide(normed, tokens, shared_inner, shared_hidden, threads);
    const float* asking = normed;
    if (router_x) {
      convert_row(typed(router_x), answer, numbers);  // where no answer is yet
      asking = answer;
    }
    if (scoring == kWithShared) {
      see(asking, shared_hidden, tokens, width, shared_width, seen);
      asking = seen;
    }
    const int64_t read_width = scoring == kWithShared ? width + shared_width : width;
    const Scorer<T> scorer{matrix(w_router, b_router, experts, read_width),
                           matrix(w_router_up, nullptr, experts, read_width), scoring, activation};
    scorer.score(asking, tokens, others, logits, threads);
    const Choice choice{softmax != 0,   normalized != 0, static_cast<float>(factor),
                        selection_bias, scales,          experts,
                        choices};
    for (int64_t t = 0; t < tokens; ++t)
      choice.choose(logits + t * experts, scores + t * experts, indices + t * choices,
                    weights + t * choices);
    moezoo_grouped_mlp_few(typed_x, w_in, w_out, b_in, b_out, dtype, indices, weights, tokens,
                           choices, width, hidden_width, activation, gated, bound, gate_bound,
                           up_bound, shift, interleaved, 0, inner, hidden, answer, threads);
    if (shared_width) {
      shared.answer(shared_hidden, tokens, always, threads);
      if (s_weigh) weigh_shared(matrix(s_weigh, nullptr, 1, width), normed, tokens, always);
    } else if (sb_down) {
      for (int64_t t = 0; t < tokens; ++t) convert_row(typed(sb_down), always + t * width, width);
    }
    if (shared_width || sb_down) add_shared<T>(always, numbers, answer);
    add_answers(answer, numbers, static_cast<T*>(residual));
  });
}
