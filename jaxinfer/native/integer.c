// Products of int8 with packed weights, summed exactly in int32.
//
// The processor multiplies unsigned by signed bytes, four at a time, so each x counts as x + 128, and 128 Σ w is taken
// off again: that is what sums begin with. Weights are packed as [panel, k / 4, PANEL, 4], filled up with zeros. Sums can
// be written as real numbers, min(max(sum · scale + shift, low), high), with a scale and a shift for each column.

#include <stdlib.h>

#include "call.h"
#include "grid.h"
#include "team.h"
#include "vector.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// Multiplications that are worth another thread.
#define WORK_PER_THREAD 200000

typedef struct {
  const int8_t *x, *w;
  const int32_t *offsets;
  void *y;                     // int32, or float where there are scales
  const float *scale, *shift;  // NULL without
  float low, high;
  int64_t rows, depth, columns;
  int64_t fours;  // the depth in groups of four, the last one filled up
  Grid grid;      // tiles of rows, and the panels of the weights
} Product;

INLINE void compute_tile(const Product *p, const int rows, const int32_t *x, int64_t first, int64_t panel) {
  __m512i sums[TILE_ROWS][2];
  const int32_t *offsets = p->offsets + panel * PANEL;
#pragma GCC unroll 16
  for (int m = 0; m < rows; m++) {
    sums[m][0] = _mm512_loadu_si512(offsets);
    sums[m][1] = _mm512_loadu_si512(offsets + LANES);
  }
  const int8_t *w = p->w + panel * p->fours * PANEL * 4;
  for (int64_t k = 0; k < p->fours; k++, w += PANEL * 4) {
    __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + LANES * 4);
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++) {
      __m512i four = _mm512_set1_epi32(x[m * p->fours + k]);
      sums[m][0] = _mm512_dpbusd_epi32(sums[m][0], four, w0);
      sums[m][1] = _mm512_dpbusd_epi32(sums[m][1], four, w1);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < rows; m++) {
    for (int64_t v = 0, column = panel * PANEL; v < 2 && column < p->columns; v++, column += LANES) {
      int64_t lanes = p->columns - column;
      __mmask16 mask = lanes >= LANES ? 0xffff : (__mmask16)((1u << lanes) - 1);
      int64_t place = (first + m) * p->columns + column;
      if (!p->scale) {
        _mm512_mask_storeu_epi32((int32_t *)p->y + place, mask, sums[m][v]);
        continue;
      }
      __m512 scale = _mm512_loadu_ps(p->scale + column), shift = _mm512_loadu_ps(p->shift + column);
      __m512 real = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[m][v]), scale, shift);
      // Of a NaN and another number these give the second operand, so that a NaN stays one.
      real = _mm512_min_ps(_mm512_set1_ps(p->high), _mm512_max_ps(_mm512_set1_ps(p->low), real));
      _mm512_mask_storeu_ps((float *)p->y + place, mask, real);
    }
  }
}

static void compute(const Product *p, int rows, const int32_t *x, int64_t first, int64_t panel) {
  switch (rows) {
#define CASE(n) \
  case n: compute_tile(p, (n), x, first, panel); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
    CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#undef CASE
  }
}

// Rows of x as unsigned bytes in whole groups of four.
static const int32_t *unsigned_rows(const Product *p, int64_t first, int64_t rows) {
  int64_t depth = p->depth, filled = p->fours * 4;
  uint8_t *held = team_memory(TILE_ROWS * filled);
  for (int64_t m = 0; m < rows; m++) {
    const int8_t *restrict from = p->x + (first + m) * depth;
    uint8_t *restrict to = held + m * filled;
    for (int64_t k = 0; k < depth; k++) to[k] = (uint8_t)from[k] ^ 0x80;
    for (int64_t k = depth; k < filled; k++) to[k] = 0;
  }
  return (const int32_t *)held;
}

static void compute_item(const void *data, int number) {
  const Product *p = data;
  Item item = grid_item(&p->grid, number);
  for (int64_t tile = item.tile; tile < item.last_tile; tile++) {
    int64_t first = p->rows * tile / p->grid.tiles, rows = p->rows * (tile + 1) / p->grid.tiles - first;
    const int32_t *x = unsigned_rows(p, first, rows);
    for (int64_t panel = item.panel; panel < item.last_panel; panel++) compute(p, (int)rows, x, first, panel);
  }
}

// Operands: x[m, k], packed weights, offsets[panel · PANEL], then scale[panel · PANEL] and shift[panel · PANEL] if any.
// Attribute `clamp` is float {low, high}. Result: y[m, n].
XLA_FFI_Error *jaxinfer_integer(XLA_FFI_CallFrame *call) {
  if (call_answers_version(call)) return NULL;
  const XLA_FFI_Buffer *x = call_operand(call, 0), *w = call_operand(call, 1), *y = call_result(call, 0);
  const float *clamp = call_array(call, "clamp", NULL);
  Product p = {
      .x = x->data, .w = w->data, .offsets = call_operand(call, 2)->data, .y = y->data,
      .scale = call->args.size > 3 ? call_operand(call, 3)->data : NULL,
      .shift = call->args.size > 3 ? call_operand(call, 4)->data : NULL,
      .low = clamp[0], .high = clamp[1],
      .rows = x->dims[0], .depth = x->dims[1], .columns = y->dims[1],
      .fours = w->dims[1],
      .grid = grid_of((x->dims[0] + TILE_ROWS - 1) / TILE_ROWS, w->dims[0]),
  };
  int64_t work = (p.rows + 8) * p.columns * p.depth;  // weights that are read for few rows take longer
  team_share(compute_item, &p, grid_items(&p.grid), 1 + (int)(work / WORK_PER_THREAD));
  return NULL;
}

int jaxinfer_has_integer(void) { return 1; }

#else

// Without such an instruction XLA's own way is as good.
XLA_FFI_Error *jaxinfer_integer(XLA_FFI_CallFrame *call) {
  call_answers_version(call);
  abort();
}

int jaxinfer_has_integer(void) { return 0; }

#endif
