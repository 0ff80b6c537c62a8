// Matrix products in fp32 of operands with any strides.

#include "matmul.h"

using namespace moezoo;

// c = a b for each of a batch: a (batch, rows, depth), b (batch, depth, columns), c (batch, rows,
// columns), with a bias (columns,) unless it is null, or added to what is there. The strides are of
// batch, row and column; c's columns lie side by side.
MOEZOO_API void moezoo_matmul(const float* a, int64_t a_batch, int64_t a_row, int64_t a_column,
                              const float* b, int64_t b_batch, int64_t b_row, int64_t b_column,
                              const float* bias, int64_t batch, int64_t rows, int64_t depth,
                              int64_t columns, int64_t accumulate, float* c, int64_t c_batch,
                              int64_t c_row, int32_t threads) {
  // Where tiles of columns are too few for all threads, rows are cut, too.
  const int64_t shares = batch * divide_up(columns, kTileColumns);
  const int64_t cuts = shares >= 4 * threads ? 1 : threads;
  const int64_t most = std::max<int64_t>(kTileRows, divide_up(rows, cuts));
  std::vector<Product> products;
  for (int64_t i = 0; i < batch; ++i)
    by_parts(rows, most, [&](int64_t first, int64_t last) {
      products.push_back({Side{a + i * a_batch + first * a_row, a_row, a_column},
                          Side{b + i * b_batch, b_column, b_row}, last - first, columns, depth,
                          Target{c + i * c_batch + first * c_row, c_row}, bias, accumulate != 0});
    });
  multiply_all(products, threads);
}
