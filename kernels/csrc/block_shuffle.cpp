// Block shuffles in fp32: y = P blockdiag(second) P blockdiag(first) x, where P moves number l of
// block k to place k of group l. What they make lies outputs first: P is every B-th row, and a
// product writes it in place.
//
// Shapes: T tokens, B blocks; of the first factor's blocks I inputs and M outputs, of the second's M
// inputs and O outputs. A row has the T numbers of one place, and may have some behind them.

#include "grouped_mlp.h"
#include "matmul.h"

namespace moezoo {
namespace {

struct Sizes {
  int64_t blocks, tokens, inputs, between, outputs;
};

// Numbers of all tokens, by the strides of token and place: one of both is 1.
template <class Number>
struct Grid {
  Number* data;
  int64_t token, place;

  Grid from(int64_t places) const { return {data + places * place, token, place}; }
  Side along_tokens() const { return {data, token, place}; }
  Side along_places() const { return {data, place, token}; }
};

// Rows of T numbers each.
template <class Number>
struct Rows {
  Number* data;
  int64_t step;

  Number* row(int64_t r) const { return data + r * step; }
  Rows from(int64_t r) const { return {row(r), step}; }
  // Every B-th row from block b's first on, where P has the block's outputs, or takes them from.
  Rows shuffled(const Sizes& s, int64_t b) const { return {row(b), s.blocks * step}; }
  Target target() const { return {data, step}; }
  Side along_rows() const { return {data, step, 1}; }
  Side along_tokens() const { return {data, 1, step}; }
};

// A factor's blocks, (B, height, width).
struct Factor {
  const float* data;
  int64_t height, width;

  const float* block(int64_t b) const { return data + b * height * width; }
  Side plain(int64_t b) const { return {block(b), width, 1}; }
  Side transposed(int64_t b) const { return {block(b), 1, width}; }
};

using Products = std::vector<Product>;

constexpr int64_t kRowGrain = 1 << 14;  // numbers that are worth a thread

// middle (B M rows) = P blockdiag(first) x.
void add_first(const Sizes& s, Grid<const float> x, const float* first, Rows<float> middle,
               Products& products) {
  const Factor factor{first, s.between, s.inputs};
  for (int64_t b = 0; b < s.blocks; ++b)
    products.push_back({factor.plain(b), x.from(b * s.inputs).along_tokens(), s.between, s.tokens,
                        s.inputs, middle.shuffled(s, b).target()});
}

// Of block b: what P takes to made (B O rows), blockdiag(second) middle.
Product second_product(const Sizes& s, int64_t b, Rows<const float> middle, const float* second,
                       Rows<float> made) {
  return {Factor{second, s.outputs, s.between}.plain(b), middle.from(b * s.between).along_tokens(),
          s.outputs, s.tokens, s.between, made.shuffled(s, b).target()};
}

// Of block b, from the slopes of its outputs: the gradients of its part of the second factor and of
// what is between the factors. Null for what is not wanted.
void add_second_backward(const Sizes& s, int64_t b, Rows<const float> slopes,
                         Rows<const float> middle, const float* second, float* d_second,
                         Rows<float> d_middle, Products& products) {
  if (d_second)
    products.push_back({slopes.along_rows(), middle.from(b * s.between).along_rows(), s.outputs,
                        s.between, s.tokens,
                        Target{d_second + b * s.outputs * s.between, s.between}});
  if (d_middle.data)
    products.push_back({Factor{second, s.outputs, s.between}.transposed(b), slopes.along_tokens(),
                        s.between, s.tokens, s.outputs, d_middle.from(b * s.between).target()});
}

// The gradient of the first factor, from the slopes of what is between the factors.
void add_first_weights(const Sizes& s, Rows<const float> d_middle, Grid<const float> x,
                       float* d_first, Products& products) {
  for (int64_t b = 0; d_first && b < s.blocks; ++b)
    products.push_back({d_middle.shuffled(s, b).along_rows(), x.from(b * s.inputs).along_places(),
                        s.between, s.inputs, s.tokens,
                        Target{d_first + b * s.between * s.inputs, s.inputs}});
}

// That of x, which lies tokens or outputs first.
void add_first_inputs(const Sizes& s, Rows<const float> d_middle, const float* first,
                      Grid<float> d_x, bool accumulate, Products& products) {
  const Factor factor{first, s.between, s.inputs};
  for (int64_t b = 0; d_x.data && b < s.blocks; ++b) {
    const Rows<const float> slopes = d_middle.shuffled(s, b);
    const Grid<float> to = d_x.from(b * s.inputs);
    Product made{factor.transposed(b), slopes.along_tokens(), s.inputs, s.tokens, s.between,
                 Target{to.data, to.place}};
    if (to.place == 1)
      made = {slopes.along_tokens(), factor.transposed(b), s.tokens, s.inputs, s.between,
              Target{to.data, to.token}};
    made.accumulate = accumulate;
    products.push_back(made);
  }
}

// to (columns, rows) = from (rows, columns) transposed, with a number added to each of its columns
// unless `added` is null.
void turn(const float* from, int64_t from_step, int64_t rows, int64_t columns, const float* added,
          float* to, int64_t to_step, int32_t threads) {
  const int64_t grain = kRowGrain / std::max<int64_t>(1, rows * kLanes) + 1;
  parallel_ranges(divide_up(columns, kLanes), grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first * kLanes; c < std::min(last * kLanes, columns); c += kLanes) {
      const int64_t width = std::min(columns - c, kLanes);
      by_registers(rows, [&](int64_t r, auto lanes) {
        Floats square[kLanes] = {};
        for (int64_t i = 0; i < lanes.count; ++i)
          square[i] = width == kLanes ? load(from + (r + i) * from_step + c, Full{})
                                      : load(from + (r + i) * from_step + c, Partial{width});
        transpose(square);
        const Floats more = added ? load(added + r, lanes) : Floats{};
        for (int64_t j = 0; j < width; ++j)
          store(to + (c + j) * to_step + r, square[j] + more, lanes);
      });
    }
  });
}

template <class Body>
void by_rows_of(const Sizes& s, int32_t threads, const Body& body) {
  parallel_ranges(s.outputs, kRowGrain / std::max<int64_t>(1, s.tokens) + 1, threads,
                  [&](int64_t first, int64_t last) {
                    for (int64_t o = first; o < last; ++o) body(o);
                  });
}

void add_to_row(float* row, int64_t width, float number) {
  by_registers(width, [&](int64_t c, auto lanes) {
    store(row + c, load(row + c, lanes) + number, lanes);
  });
}

float sum_of_row(const float* row, int64_t width) {
  Floats total{};
  by_registers(width, [&](int64_t c, auto lanes) { total += load(row + c, lanes); });
  return sum(total);
}

// Numbers from one row to the next in scratch memory: a cache line more than T, as rows that are a
// multiple of 1 KiB apart share few places of a cache.
int64_t row_step(int64_t tokens) {
  const int64_t whole = divide_up(tokens, kLanes) * kLanes;
  return whole % 256 ? whole : whole + 16;
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// made (T, B O), tokens first, of x (T, B I), with a bias (B O,) unless it is null. Kept for the
// backward pass is what is between the factors, middle (B M rows).
MOEZOO_API void moezoo_block_shuffle(const float* x, int64_t x_token, int64_t x_place,
                                     const float* first, const float* second, const float* bias,
                                     int64_t blocks, int64_t tokens, int64_t inputs, int64_t between,
                                     int64_t outputs, int64_t step, float* middle, float* made,
                                     int32_t threads) {
  const Sizes s{blocks, tokens, inputs, between, outputs};
  const int64_t width = blocks * outputs, own_step = row_step(tokens);
  const Scratch rows = scratch(width * own_step);
  Products products;
  add_first(s, {x, x_token, x_place}, first, {middle, step}, products);
  multiply_all(products, threads);
  products.clear();
  for (int64_t b = 0; b < blocks; ++b)
    products.push_back(second_product(s, b, {middle, step}, second, {rows.get(), own_step}));
  multiply_all(products, threads);
  turn(rows.get(), own_step, width, tokens, bias, made, width, threads);
}

// The gradients of x, which lies as d_x does, and of both factors, null if not wanted, from slopes
// (T, B O) by their strides.
MOEZOO_API void moezoo_block_shuffle_backward(
    const float* slope, int64_t slope_token, int64_t slope_place, const float* x, int64_t x_token,
    int64_t x_place, const float* first, const float* second, int64_t blocks, int64_t tokens,
    int64_t inputs, int64_t between, int64_t outputs, int64_t step, const float* middle, float* d_x,
    int64_t d_x_token, int64_t d_x_place, float* d_first, float* d_second, int32_t threads) {
  const Sizes s{blocks, tokens, inputs, between, outputs};
  const int64_t width = blocks * outputs, own_step = row_step(tokens);
  const bool turned = slope_token != 1;
  const Scratch rows = scratch(turned ? width * own_step : 0);
  Rows<const float> slopes{slope, slope_place};
  if (turned) {
    turn(slope, slope_token, tokens, width, nullptr, rows.get(), own_step, threads);
    slopes = {rows.get(), own_step};
  }
  const bool deeper = d_x || d_first;
  const Scratch d_middle = scratch(deeper ? blocks * between * own_step : 0);
  Products products;
  for (int64_t b = 0; b < blocks; ++b)
    add_second_backward(s, b, slopes.shuffled(s, b), {middle, step}, second, d_second,
                        {deeper ? d_middle.get() : nullptr, own_step}, products);
  multiply_all(products, threads);
  products.clear();
  add_first_weights(s, {d_middle.get(), own_step}, {x, x_token, x_place}, d_first, products);
  add_first_inputs(s, {d_middle.get(), own_step}, first, {d_x, d_x_token, d_x_place}, false,
                   products);
  multiply_all(products, threads);
}

// made (B O rows) = act(gate) up, bounds and shift being those of Glu, of two block shuffles of x (T,
// B I). Kept are what is between both pairs of factors, middle (2, B M rows), and both factors, inner
// (B O rows of 2 T).
MOEZOO_API void moezoo_block_shuffle_unit(
    const float* x, int64_t x_token, int64_t x_place, const float* gate_first,
    const float* gate_second, const float* gate_bias, const float* up_first, const float* up_second,
    const float* up_bias, int64_t blocks, int64_t tokens, int64_t inputs, int64_t between,
    int64_t outputs, int64_t activation, int64_t bound, double gate_bound, double up_bound,
    double shift, int64_t step, int64_t inner_step, float* middle, float* inner, float* made,
    int32_t threads) {
  const Sizes s{blocks, tokens, inputs, between, outputs};
  const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                static_cast<float>(shift), false};
  const Grid<const float> read{x, x_token, x_place};
  const Rows<float> middles[] = {{middle, step}, {middle + blocks * between * step, step}};
  Products products;
  add_first(s, read, gate_first, middles[0], products);
  add_first(s, read, up_first, middles[1], products);
  multiply_all(products, threads);
  // Block by block, whose values are in a cache yet when the activation reads them.
  for (int64_t b = 0; b < blocks; ++b) {
    const Product both[] = {
        second_product(s, b, {middles[0].data, step}, gate_second, {inner, inner_step}),
        second_product(s, b, {middles[1].data, step}, up_second, {inner + tokens, inner_step})};
    products.assign(both, both + 2);
    multiply_all(products, threads);
    with_activation(activation, [&](auto act) {
      by_rows_of(s, threads, [&](int64_t o) {
        const int64_t place = o * blocks + b;
        float* const row = inner + place * inner_step;
        if (gate_bias) add_to_row(row, tokens, gate_bias[place]);
        if (up_bias) add_to_row(row + tokens, tokens, up_bias[place]);
        gated_row(act, glu, row, row + tokens, tokens, made + place * step);
      });
    });
  }
}

// The gradients of that, null if not wanted; slopes (B O rows), and x lies as d_x does.
MOEZOO_API void moezoo_block_shuffle_unit_backward(
    const float* slope, int64_t slope_step, const float* x, int64_t x_token, int64_t x_place,
    const float* gate_first, const float* gate_second, const float* up_first,
    const float* up_second, int64_t blocks, int64_t tokens, int64_t inputs, int64_t between,
    int64_t outputs, int64_t activation, int64_t bound, double gate_bound, double up_bound,
    double shift, int64_t step, int64_t inner_step, const float* middle, const float* inner,
    float* d_x, int64_t d_x_token, int64_t d_x_place, float* d_gate_first, float* d_gate_second,
    float* d_gate_bias, float* d_up_first, float* d_up_second, float* d_up_bias,
    int32_t threads) {
  const Sizes s{blocks, tokens, inputs, between, outputs};
  const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                static_cast<float>(shift), false};
  const int64_t own_step = row_step(tokens), numbers = blocks * between;
  // The slopes of one block at a time: they stay in a cache, and memory for all is never touched.
  const Scratch room = scratch(2 * outputs * own_step), d_middle = scratch(2 * numbers * own_step);
  const Rows<float> d_gate{room.get(), own_step}, d_up = d_gate.from(outputs);
  const Rows<const float> middles[] = {{middle, step}, {middle + numbers * step, step}};
  const Rows<float> d_middles[] = {{d_middle.get(), own_step},
                                   {d_middle.get() + numbers * own_step, own_step}};
  const auto deeper = [&](int part, const float* d_first) {
    return Rows<float>{d_x || d_first ? d_middles[part].data : nullptr, own_step};
  };
  Products products;
  for (int64_t b = 0; b < blocks; ++b) {
    with_activation(activation, [&](auto act) {
      by_rows_of(s, threads, [&](int64_t o) {
        const int64_t place = o * blocks + b;
        const float* const row = inner + place * inner_step;
        gated_row_backward(act, glu, slope + place * slope_step, row, row + tokens, tokens,
                           d_gate.row(o), d_up.row(o));
        if (d_gate_bias) d_gate_bias[place] = sum_of_row(d_gate.row(o), tokens);
        if (d_up_bias) d_up_bias[place] = sum_of_row(d_up.row(o), tokens);
      });
    });
    products.clear();
    add_second_backward(s, b, {d_gate.data, own_step}, middles[0], gate_second, d_gate_second,
                        deeper(0, d_gate_first), products);
    add_second_backward(s, b, {d_up.data, own_step}, middles[1], up_second, d_up_second,
                        deeper(1, d_up_first), products);
    multiply_all(products, threads);
  }
  const Rows<const float> found[] = {{d_middles[0].data, own_step}, {d_middles[1].data, own_step}};
  products.clear();
  add_first_weights(s, found[0], {x, x_token, x_place}, d_gate_first, products);
  add_first_weights(s, found[1], {x, x_token, x_place}, d_up_first, products);
  add_first_inputs(s, found[0], gate_first, {d_x, d_x_token, d_x_place}, false, products);
  multiply_all(products, threads);
  products.clear();
  add_first_inputs(s, found[1], up_first, {d_x, d_x_token, d_x_place}, true, products);
  multiply_all(products, threads);
}
