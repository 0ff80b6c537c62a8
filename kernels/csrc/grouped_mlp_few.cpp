// Experts on a few rows, as when decoding: matrices are read once, straight from where they
// are, and each of their rows is multiplied with the few tokens that chose the expert; if they lie
// transposed, each row of that is added as often as the token's number says.
//
// Shapes: T tokens, K choices, D width, E experts, F hidden width, I = 2 F if gated else F. A slot
// is token * K + choice.

#include "few_products.h"
#include "grouped_mlp.h"

namespace moezoo {
namespace {

constexpr int64_t kLeastActivated = 1 << 15;  // numbers that are worth a thread

template <class T>
struct FewRows {
  const T *x, *w_in, *w_out, *bias_in, *bias_out;  // biases may be null
  const float* weights;                            // (T, K)
  int64_t choices, width, hidden_width, inner_width;
  bool transposed;  // the matrices lie as (D, I) and (F, D)
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

// One expert's matrix out of a stack.
template <class T>
Matrix<T> matrix_of(const T* stack, const T* biases, int64_t expert, int64_t rows, int64_t width) {
  const T* bias = biases ? biases + expert * rows : nullptr;
  return {stack + expert * rows * width, bias, rows, width};
}

// Pointers to the rows of a table that belong to the slots of a group.
template <class P>
std::vector<P*> rows_of_group(const Group& group, P* table, int64_t slots_per_row, int64_t width) {
  std::vector<P*> rows;
  for (int64_t s : group.slots) rows.push_back(table + s / slots_per_row * width);
  return rows;
}

// out[i][n] for first <= n < last: the products of those rows of a matrix with x[i], and biases.
template <class T>
void product(const FewRows<T>& p, const Matrix<T>& matrix, const float* const* x, int64_t vectors,
             int64_t first, int64_t last, float* const* out) {
  if (p.transposed) multiply_transposed(matrix, x, vectors, first, last, out);
  else multiply<float>(matrix, x, vectors, first, last, out);
}

// inner (T K, I) of the slots in groups, for rows i of w_in that lie in the range.
template <class T>
void first_product(const FewRows<T>& p, const float* x, const Group& group, int64_t first,
                   int64_t last, float* inner) {
  const auto from = rows_of_group(group, x, p.choices, p.width);
  const auto to = rows_of_group(group, inner, 1, p.inner_width);
  const auto matrix = matrix_of(p.w_in, p.bias_in, group.expert, p.inner_width, p.width);
  product(p, matrix, from.data(), static_cast<int64_t>(from.size()), first, last, to.data());
}

// Adds the answers' columns d that lie in the range to output (T, D).
template <class T>
void second_product(const FewRows<T>& p, const Group& group, const float* hidden, int64_t first,
                    int64_t last, float* output) {
  const auto from = rows_of_group(group, hidden, 1, p.hidden_width);
  const int64_t slots = static_cast<int64_t>(from.size()), columns = last - first;
  std::vector<float> answers(slots * columns);
  const auto to = rows_of(answers.data() - first, slots, columns);
  const auto matrix = matrix_of(p.w_out, p.bias_out, group.expert, p.width, p.hidden_width);
  product(p, matrix, from.data(), slots, first, last, to.data());
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t s = group.slots[i];
    float* sums = output + s / p.choices * p.width;
    for (int64_t d = first; d < last; ++d) sums[d] += p.weights[s] * to[i][d];
  }
}

// One token's experts that are so small that each ends before hardware has seen that it is read:
// all their rows are one list, of which the next ones are asked for. Of the second matrices a row
// of each is added up together, as there are more rows than numbers in them.
template <class T>
class OneToken {
 public:
  OneToken(const FewRows<T>& problem, const int64_t* indices)
      : p_(problem), indices_(indices), x_(problem.width) {
    for (int64_t s = 0; s < p_.choices; ++s)
      if (indices[s] >= 0) slots_.push_back(s);
    std::stable_sort(slots_.begin(), slots_.end(),
                     [&](int64_t a, int64_t b) { return indices[a] < indices[b]; });
    convert_row(p_.x, x_.data(), p_.width);
  }

  // output (D,) of the token; inner (K, I) and hidden (K, F) are scratch.
  void run(int64_t activation, bool gated, const Glu& glu, float* inner, float* hidden,
           float* output, int32_t threads) const {
    const int64_t rows = count() * p_.inner_width;
    parallel_ranges(rows, least_rows(p_.width, 1), threads,
                    [&](int64_t first, int64_t last) { multiply_listed(first, last, inner); });
    for (int64_t s : slots_) fetch_start(out_rows(s));
    with_activation(activation, [&](auto act) {
      for (int64_t s : slots_) {
        float* own = hidden + s * p_.hidden_width;
        activate_row(act, gated, glu, inner + s * p_.inner_width, p_.hidden_width, own);
        by_registers(p_.hidden_width, [&](int64_t c, auto lanes) {
          store(own + c, p_.weights[s] * load(own + c, lanes), lanes);
        });
      }
    });
    const int64_t grain = least_rows(1 + count() * p_.hidden_width, 1);
    parallel_ranges(p_.width, grain, threads,
                    [&](int64_t first, int64_t last) { add_up(first, last, hidden, output); });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(slots_.size()); }

  const T* out_rows(int64_t slot) const {
    return p_.w_out + indices_[slot] * p_.width * p_.hidden_width;
  }

  const T* in_rows(int64_t slot) const {
    return p_.w_in + indices_[slot] * p_.inner_width * p_.width;
  }

  static void fetch_start(const T* rows) {
    constexpr int64_t kLine = kCacheLine / int64_t{sizeof(T)};
    for (int64_t c = 0; c < kAheadBytes / int64_t{sizeof(T)}; c += kLine) fetch_ahead(rows + c);
  }

  // The lanes of a row's product with x. Two sums run side by side, as each addition waits for the
  // one before it; meanwhile a later row is asked for.
  Floats product(const T* row, const T* later) const {
    constexpr int64_t kPair = 2 * kLanes, kLine = kCacheLine / int64_t{sizeof(T)};
    const float* x = x_.data();
    Floats sum{}, other{};
    int64_t c = 0;
    for (; c + kPair <= p_.width; c += kPair) {
      sum += load(row + c, Full{}) * load(x + c, Full{});
      other += load(row + c + kLanes, Full{}) * load(x + c + kLanes, Full{});
      for (int64_t ahead = c; ahead < c + kPair; ahead += kLine) fetch_ahead(later + ahead);
    }
    by_registers(p_.width - c, [&](int64_t rest, auto lanes) {
      sum += load(row + c + rest, lanes) * load(x + c + rest, lanes);
    });
    return sum + other;
  }

  // inner (K, I) of the rows of the list for first <= row < last.
  void multiply_listed(int64_t first, int64_t last, float* inner) const {
    const int64_t wide = p_.inner_width, bytes = p_.width * int64_t{sizeof(T)};
    const int64_t distance = std::min((2 * kAheadBytes + bytes - 1) / bytes, wide);
    Totals<float> totals;
    for (int64_t at = first / wide, i = first % wide; at * wide + i < last; ++at, i = 0) {
      const int64_t end = std::min(wide, last - at * wide), slot = slots_[at];
      const T* rows = in_rows(slot);
      const T* next = in_rows(slots_[std::min(at + 1, count() - 1)]);
      const T* biases = p_.bias_in ? p_.bias_in + indices_[slot] * wide : nullptr;
      for (; i < end; ++i) {
        const int64_t later = i + distance;
        const T* row = rows + i * p_.width;
        const T* ahead = later < wide ? rows + later * p_.width : next + (later - wide) * p_.width;
        const float bias = biases ? load(biases + i) : 0.0f;
        totals.add(product(row, ahead), bias, inner + slot * wide + i);
      }
    }
    totals.flush();
  }

  // output[d] for first <= d < last, of hidden values that are weighted already.
  void add_up(int64_t first, int64_t last, const float* hidden, float* output) const {
    constexpr int64_t kAheadWeights = kAheadBytes / 2 / int64_t{sizeof(T)};
    const int64_t n = count(), width = p_.hidden_width;
    std::vector<const T*> rows(n);
    std::vector<const float*> values(n);
    for (int64_t i = 0; i < n; ++i) {
      rows[i] = out_rows(slots_[i]);
      values[i] = hidden + slots_[i] * width;
    }
    Totals<float> totals;
    for (int64_t d = first; d < last; ++d) {
      Floats sum{};
      by_registers(width, [&](int64_t c, auto lanes) {
        for (int64_t i = 0; i < n; ++i) {
          const T* row = rows[i] + d * width + c;
          sum += load(row, lanes) * load(values[i] + c, lanes);
          fetch_ahead(row + kAheadWeights);
        }
      });
      float bias = 0.0f;
      for (size_t i = 0; p_.bias_out && i < slots_.size(); ++i)
        bias += p_.weights[slots_[i]] * load(p_.bias_out + indices_[slots_[i]] * p_.width + d);
      totals.add(sum, bias, output + d);
    }
    totals.flush();
  }

  const FewRows<T>& p_;
  const int64_t* indices_;
  std::vector<float> x_;
  std::vector<int64_t> slots_;
};

// Each thread owns columns of a result, so sums are in the order of experts whatever their number.
template <class T>
void few(const FewRows<T>& p, const int64_t* indices, int64_t tokens, int64_t activation,
         bool gated, const Glu& glu, float* inner, float* hidden, float* output,
         int32_t threads) {
  if (tokens == 1 && !p.transposed && p.hidden_width * int64_t{sizeof(T)} < kLongBytes) {
    const OneToken<T> token(p, indices);
    return token.run(activation, gated, glu, inner, hidden, output, threads);
  }
  const std::vector<Group> groups = group_by_expert(indices, tokens * p.choices);
  const auto each_group = [&](const auto& body) {
    for (const Group& group : groups) body(group);
  };
  std::vector<float> x(tokens * p.width);
  convert_row(p.x, x.data(), tokens * p.width);
  const int64_t experts = std::max<int64_t>(1, static_cast<int64_t>(groups.size()));
  const int64_t each = tokens * p.choices / experts;
  const int64_t rows_in = least_rows(experts * p.width, each);
  parallel_ranges(p.inner_width, rows_in, threads, [&](int64_t first, int64_t last) {
    each_group([&](const Group& group) { first_product(p, x.data(), group, first, last, inner); });
  });
  const int64_t rows_activated = 1 + kLeastActivated / p.hidden_width;
  parallel_ranges(tokens * p.choices, rows_activated, threads, [&](int64_t first, int64_t last) {
    with_activation(activation, [&](auto act) {
      for (int64_t s = first; s < last; ++s)
        if (indices[s] >= 0)
          activate_row(act, gated, glu, inner + s * p.inner_width, p.hidden_width,
                       hidden + s * p.hidden_width);
    });
  });
  std::fill(output, output + tokens * p.width, 0.0f);
  const int64_t rows_out = least_rows(experts * p.hidden_width, each);
  parallel_ranges(p.width, rows_out, threads, [&](int64_t first, int64_t last) {
    each_group([&](const Group& group) { second_product(p, group, hidden, first, last, output); });
  });
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// Transposed: w_in lies as (E, D, I), w_out as (E, F, D).
// output (T, D) in fp32 of x (T, D); inner (T K, I) and hidden (T K, F) are scratch in fp32.
MOEZOO_API void moezoo_grouped_mlp_few(const void* x, const void* w_in, const void* w_out,
                                       const void* bias_in, const void* bias_out, int64_t dtype,
                                       const int64_t* indices, const float* weights,
                                       int64_t tokens, int64_t choices, int64_t width,
                                       int64_t hidden_width, int64_t activation, int64_t gated,
                                       int64_t bound, double gate_bound, double up_bound,
                                       double shift, int64_t interleaved,
                                       int64_t transposed, float* inner, float* hidden,
                                       float* output, int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto typed = [](const void* data) { return static_cast<const T*>(data); };
    const int64_t inner_width = gated ? 2 * hidden_width : hidden_width;
    const FewRows<T> problem{typed(x), typed(w_in), typed(w_out), typed(bias_in), typed(bias_out),
                             weights,  choices,     width,        hidden_width,   inner_width,
                             transposed != 0};
    const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                  static_cast<float>(shift), interleaved != 0};
    few(problem, indices, tokens, activation, gated != 0, glu, inner, hidden, output, threads);
  });
}
