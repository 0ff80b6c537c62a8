// Hard decisions in binary trees, and what answers at the end of a path or along it.
//
// Node i of a tree has the children 2 i + 1 and 2 i + 2. A token asks one node per level, so only
// as many rows are read. The arithmetic is fp32; parameters are fp32 or bf16.

#include <algorithm>
#include <utility>
#include <vector>

#include "activations.h"
#include "lane_sums.h"

namespace moezoo {
namespace {

// Fewer multiply-adds than this are not worth waking a thread for.
constexpr int64_t kWorkPerThread = 1 << 16;

int64_t tokens_per_thread(int64_t work_per_token) {
  return std::max(int64_t{1}, kWorkPerThread / std::max(int64_t{1}, work_per_token));
}

template <class T>
struct Nodes {
  const T* weight;  // (nodes, width)
  const T* bias;
  int64_t width;

  float logit(int64_t node, const float* x) const {
    return dot(weight + node * width, x, width) + load(bias + node);
  }
};

// One token's next row is known only after its last sum; those of others fill the wait.
constexpr int64_t kSideBySide = 8;

template <class T>
void descend(const Nodes<T>& nodes, int64_t depth, const float* x, int64_t tokens,
             int64_t* leaves) {
  int64_t at[kSideBySide] = {};
  for (int64_t level = 0; level < depth; ++level)
    for (int64_t t = 0; t < tokens; ++t)
      at[t] = 2 * at[t] + 1 + (nodes.logit(at[t], x + t * nodes.width) >= 0.0f);
  for (int64_t t = 0; t < tokens; ++t) leaves[t] = at[t] - ((int64_t{1} << depth) - 1);
}

// The neurons that answer a token: their logits, then their activations, and their output rows.
template <class T>
class Answers {
 public:
  void clear() { rows_.clear(); }

  void add(const T* row, float logit) { rows_.add(row, logit); }

  void sum_activated(int64_t activation, int64_t width, float* output) {
    float* logits = rows_.weights.data();
    by_registers(rows_.size(), [&](int64_t i, auto lanes) {
      store(logits + i, activate(activation, load(logits + i, lanes)).value, lanes);
    });
    add_rows(rows_, 0, rows_.size(), width, output);
  }

 private:
  WeightedRows<T> rows_;
};

// A linear map of a few tokens. Every number is summed in an order that does not depend on how
// many tokens there are.
template <class T>
struct Linear {
  const T* weight;  // (outputs, inputs)
  const T* bias;    // or null
  int64_t inputs, outputs;

  void apply(const float* const* x, float* const* y, int64_t tokens) const {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) apply<4>(x + t, y + t);
    for (; t + 2 <= tokens; t += 2) apply<2>(x + t, y + t);
    for (; t < tokens; ++t) apply<1>(x + t, y + t);
  }

 private:
  template <int Tokens>
  void apply(const float* const* x, float* const* y) const {
    constexpr int64_t kRows = kLanes / Tokens;
    int64_t o = 0;
    for (; o + kRows <= outputs; o += kRows) rows<kRows, Tokens>(o, x, y);
    for (; o < outputs; ++o) rows<1, Tokens>(o, x, y);
  }

  // A register of sums, each of a row and a token: the more tokens, the less often a row is read.
  template <int64_t Rows, int Tokens>
  void rows(int64_t o, const float* const* x, float* const* y) const {
    const T* first = weight + o * inputs;
    Floats sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= inputs; i += kLanes) {
      Floats values[Tokens];
      for (int t = 0; t < Tokens; ++t) values[t] = load(x[t] + i, Full{});
      for (int64_t r = 0; r < Rows; ++r) {
        const Floats weights = load(first + r * inputs + i, Full{});
        for (int t = 0; t < Tokens; ++t) sums[r * Tokens + t] += weights * values[t];
      }
    }
    Floats total = i > 0 ? sums_of_lanes(sums) : Floats{};
    for (; i < inputs; ++i) {
      Floats weights{}, values{};
      for (int64_t r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) {
          weights[r * Tokens + t] = load(first + r * inputs + i);
          values[r * Tokens + t] = x[t][i];
        }
      total += weights * values;
    }
    for (int64_t r = 0; r < Rows; ++r)
      for (int t = 0; t < Tokens; ++t)
        y[t][o + r] = total[r * Tokens + t] + (bias ? load(bias + o + r) : 0.0f);
  }
};

// A feed-forward block per leaf: gated or not, biases or null.
template <class T>
struct Leaves {
  const T *in, *out, *in_bias, *out_bias;
  int64_t width, hidden, activation;
  bool gated;

  int64_t inner() const { return gated ? 2 * hidden : hidden; }

  Linear<T> up(int64_t leaf) const {
    const T* bias = in_bias ? in_bias + leaf * inner() : nullptr;
    return {in + leaf * inner() * width, bias, width, inner()};
  }

  Linear<T> down(int64_t leaf) const {
    const T* bias = out_bias ? out_bias + leaf * width : nullptr;
    return {out + leaf * width * hidden, bias, hidden, width};
  }

  // inner (2 hidden or hidden) becomes the hidden activations, in its first part.
  void activate_inner(float* values) const {
    by_registers(hidden, [&](int64_t i, auto lanes) {
      Floats value = activate(activation, load(values + i, lanes)).value;
      if (gated) value *= load(values + hidden + i, lanes);
      store(values + i, value, lanes);
    });
  }
};

// Tokens that reach the same leaf, a few at a time.
constexpr int kTokensAtOnce = 16;

struct Group {
  int64_t leaf, begin, count;
};

using LeafAndToken = std::pair<int64_t, int64_t>;

std::vector<LeafAndToken> sort_by_leaf(const int64_t* leaves, int64_t tokens) {
  std::vector<LeafAndToken> sorted(tokens);
  for (int64_t t = 0; t < tokens; ++t) sorted[t] = {leaves[t], t};
  std::sort(sorted.begin(), sorted.end());
  return sorted;
}

std::vector<Group> group_by_leaf(const std::vector<LeafAndToken>& sorted) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < static_cast<int64_t>(sorted.size()); ++i) {
    const int64_t leaf = sorted[i].first;
    const bool joins = !groups.empty() && groups.back().leaf == leaf &&
                       groups.back().count < kTokensAtOnce;
    if (joins) ++groups.back().count;
    else groups.push_back({leaf, i, 1});
  }
  return groups;
}

template <class T>
void answer_group(const Leaves<T>& leaves, const Group& group, const LeafAndToken* members,
                  const float* x, float* scratch, float* output) {
  const float* from[kTokensAtOnce];
  float *inner[kTokensAtOnce], *to[kTokensAtOnce];
  for (int64_t t = 0; t < group.count; ++t) {
    from[t] = x + members[t].second * leaves.width;
    to[t] = output + members[t].second * leaves.width;
    inner[t] = scratch + t * leaves.inner();
  }
  if (group.leaf < 0) {
    for (int64_t t = 0; t < group.count; ++t) std::fill(to[t], to[t] + leaves.width, 0.0f);
    return;
  }
  leaves.up(group.leaf).apply(from, inner, group.count);
  for (int64_t t = 0; t < group.count; ++t) leaves.activate_inner(inner[t]);
  leaves.down(group.leaf).apply(inner, to, group.count);
}

}  // namespace
}  // namespace moezoo

// leaves[t]: the leaf, from 0, that token t reaches by going right where a logit is >= 0.
MOEZOO_API void moezoo_tree_descent(const float* x, const void* weight, const void* bias,
                                    int64_t* leaves, int64_t tokens, int64_t width, int64_t depth,
                                    int64_t dtype, int32_t threads) {
  using namespace moezoo;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Nodes<T> nodes{static_cast<const T*>(weight), static_cast<const T*>(bias), width};
    const int64_t grain = tokens_per_thread(depth * width);
    parallel_ranges(tokens, grain, threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t += kSideBySide)
        descend(nodes, depth, x + t * width, std::min(kSideBySide, end - t), leaves + t);
    });
  });
}

// output[t] = block of leaves[t] applied to x[t], or zeros where that is negative.
MOEZOO_API void moezoo_leaf_mlp(const float* x, const int64_t* leaf_of, const void* in,
                                const void* out, const void* in_bias, const void* out_bias,
                                float* output, int64_t tokens, int64_t width, int64_t hidden,
                                int64_t activation, int64_t gated, int64_t dtype,
                                int32_t threads) {
  using namespace moezoo;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Leaves<T> leaves{static_cast<const T*>(in),      static_cast<const T*>(out),
                           static_cast<const T*>(in_bias), static_cast<const T*>(out_bias),
                           width,  hidden, activation, gated != 0};
    const auto sorted = sort_by_leaf(leaf_of, tokens);
    const auto groups = group_by_leaf(sorted);
    const int64_t grain = tokens_per_thread((leaves.inner() + hidden) * width);
    const auto count = static_cast<int64_t>(groups.size());
    parallel_ranges(count, grain, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(kTokensAtOnce * leaves.inner());
      for (int64_t g = begin; g < end; ++g)
        answer_group(leaves, groups[g], &sorted[groups[g].begin], x, scratch.data(), output);
    });
  });
}

// output[t] = sum of act(logit) * row of `out` over the depth + 1 neurons on the path of each tree,
// which goes right where a logit is > 0, that of asking[t] if given (may be null) instead of x[t];
// bottoms: (tokens, trees), the last neurons, from 0.
MOEZOO_API void moezoo_path_neurons(const float* x, const float* asking, const void* in,
                                    const void* bias, const void* out, float* output,
                                    int64_t* bottoms, int64_t tokens, int64_t trees, int64_t depth,
                                    int64_t width, int64_t activation, int64_t dtype,
                                    int32_t threads) {
  using namespace moezoo;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Nodes<T> nodes{static_cast<const T*>(in), static_cast<const T*>(bias), width};
    const int64_t first_bottom = (int64_t{1} << depth) - 1, per_tree = 2 * first_bottom + 1;
    const int64_t grain = tokens_per_thread(2 * trees * (depth + 1) * width);
    parallel_ranges(tokens, grain, threads, [&](int64_t begin, int64_t end) {
      Answers<T> answers;
      for (int64_t t = begin; t < end; ++t) {
        answers.clear();
        for (int64_t tree = 0; tree < trees; ++tree) {
          int64_t node = 0;
          for (int64_t level = 0;; ++level) {
            const int64_t row = tree * per_tree + node;
            const float logit = nodes.logit(row, x + t * width);
            answers.add(static_cast<const T*>(out) + row * width, logit);
            if (level == depth) break;
            const float decides = asking ? nodes.logit(row, asking + t * width) : logit;
            node = 2 * node + 1 + (decides > 0.0f);
          }
          bottoms[t * trees + tree] = node - first_bottom;
        }
        answers.sum_activated(activation, width, output + t * width);
      }
    });
  });
}
