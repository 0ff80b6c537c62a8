// Experts on a handful of rows, as when decoding: matrices are read once, straight from where they
// are, and each of their rows is multiplied with the few tokens that chose the expert.
//
// Shapes: T tokens, K choices, D width, E experts, F hidden width, I = 2 F if gated else F. A slot
// is token * K + choice.

#include "grouped_mlp.h"

namespace moezoo {
namespace {

template <class T>
struct FewRows {
  const T *x, *w_in, *w_out, *bias_in, *bias_out;  // biases may be null
  const float* weights;                            // (T, K)
  int64_t choices, width, hidden_width, inner_width;
};

// The slots of one expert.
struct Group {
  int64_t expert;
  std::vector<int64_t> slots;
};

// Slots with an expert, in the order of experts, then of slots.
std::vector<Group> group_by_expert(const int64_t* indices, int64_t slots) {
  std::vector<int64_t> order;
  for (int64_t s = 0; s < slots; ++s)
    if (indices[s] >= 0) order.push_back(s);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return indices[a] < indices[b]; });
  std::vector<Group> groups;
  for (int64_t s : order) {
    if (groups.empty() || groups.back().expert != indices[s]) groups.push_back({indices[s], {}});
    groups.back().slots.push_back(s);
  }
  return groups;
}

// inner (T K, I) of the slots in groups, for rows i of w_in that lie in the range.
template <class T>
void first_product(const FewRows<T>& p, const Group& group, int64_t first, int64_t last,
                   float* inner) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t at = group.expert * p.inner_width + i;
    const T* row = p.w_in + at * p.width;
    const float bias = p.bias_in ? load(p.bias_in + at) : 0.0f;
    for (int64_t s : group.slots)
      inner[s * p.inner_width + i] = bias + dot(row, p.x + s / p.choices * p.width, p.width);
  }
}

// Adds the answers' columns d that lie in the range to output (T, D).
template <class T>
void second_product(const FewRows<T>& p, const Group& group, const float* hidden, int64_t first,
                    int64_t last, float* output) {
  for (int64_t d = first; d < last; ++d) {
    const int64_t at = group.expert * p.width + d;
    const T* row = p.w_out + at * p.hidden_width;
    const float bias = p.bias_out ? load(p.bias_out + at) : 0.0f;
    for (int64_t s : group.slots) {
      const float answer = bias + dot(row, hidden + s * p.hidden_width, p.hidden_width);
      output[s / p.choices * p.width + d] += p.weights[s] * answer;
    }
  }
}

// Each thread owns columns of a result, so sums are in the order of experts whatever their number.
template <class T>
void few(const FewRows<T>& p, const int64_t* indices, int64_t tokens, int64_t activation,
         bool gated, float* inner, float* hidden, float* output, int32_t threads) {
  const std::vector<Group> groups = group_by_expert(indices, tokens * p.choices);
  const auto each_group = [&](const auto& body) {
    for (const Group& group : groups) body(group);
  };
  parallel_ranges(p.inner_width, 64, threads, [&](int64_t first, int64_t last) {
    each_group([&](const Group& group) { first_product(p, group, first, last, inner); });
  });
  each_group([&](const Group& group) {
    for (int64_t s : group.slots)
      with_activation(activation, [&](auto act) {
        activate_row(act, gated, inner + s * p.inner_width, p.hidden_width,
                     hidden + s * p.hidden_width);
      });
  });
  std::fill(output, output + tokens * p.width, 0.0f);
  parallel_ranges(p.width, 64, threads, [&](int64_t first, int64_t last) {
    each_group([&](const Group& group) { second_product(p, group, hidden, first, last, output); });
  });
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// output (T, D) in fp32 of x (T, D); inner (T K, I) and hidden (T K, F) are scratch in fp32.
MOEZOO_API void moezoo_grouped_mlp_few(const void* x, const void* w_in, const void* w_out,
                                       const void* bias_in, const void* bias_out, int64_t dtype,
                                       const int64_t* indices, const float* weights,
                                       int64_t tokens, int64_t choices, int64_t width,
                                       int64_t hidden_width, int64_t activation, int64_t gated,
                                       float* inner, float* hidden, float* output,
                                       int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto typed = [](const void* data) { return static_cast<const T*>(data); };
    const int64_t inner_width = gated ? 2 * hidden_width : hidden_width;
    const FewRows<T> problem{typed(x), typed(w_in), typed(w_out), typed(bias_in), typed(bias_out),
                             weights,  choices,     width,        hidden_width,   inner_width};
    few(problem, indices, tokens, activation, gated != 0, inner, hidden, output, threads);
  });
}
