// Convolutions and products with packed weights.
//
// y[n, i, j, c] = clamp(Σ x[n, i·s + a·d − p, j·s + b·d − p, k] · w[a, b, k, c] + bias[c] + addend[n, i, j, c]), channels
// last. A product of matrices is the case of one image of height 1 under a window of one pixel. Weights are packed in
// panels of PANEL output channels: [panel, a, b, k, PANEL]. Of each `pool` of neighbouring results the largest can be kept.
//
// A tile is up to TILE_ROWS pixels times one panel, all in registers. What a tile reads of one row of its window lies
// together in memory where the window is not dilated; pixels at an edge read a copy with zeros around.

#include "call.h"
#include "grid.h"
#include "result.h"
#include "row.h"
#include "team.h"
#include "vector.h"
#include "vector_math.h"

// Multiplications that are worth another thread: it is told of them in the time that a core takes for so many.
#define WORK_PER_THREAD 50000

typedef struct {
  const float *x, *w;
  Result result;
  int64_t height, width, depth;              // of an image of x, and its channels
  int64_t out_height, out_width, out_depth;  // of y
  int64_t rows, columns;                     // of the window
  int64_t stride[2], before[2], dilation[2];
  int64_t pool[2];       // a pixel of y is the largest of so many times so many results
  int64_t members;       // of a pool
  int64_t pixels;        // of y, all images together
  int64_t line;          // pixels that tiles may be cut from: all of y, or where there are pools a row of it
  int64_t line_tiles;    // it is cut into so many
  Grid grid;             // the tiles of all lines, and the panels of the weights
  int64_t runs, length;  // a window is so many runs of so many numbers that lie together
  bool plain;            // windows of one pixel, next to each other as those of x are
} Convolution;

// Of each pool the largest. Pools stand side by side: the tile has their first rows, then their second ones.
static void store_largest(const Convolution *c, int rows, int64_t place, int64_t columns, Vector all[2][TILE_ROWS]) {
  int64_t across = c->pool[1], line = rows / c->pool[0];
  for (int64_t m = 0; m < line; m += across, place += c->out_depth) {
    for (int v = 0; v < 2 && v * LANES < columns; v++) {
      Vector largest = all[v][m];
      for (int64_t from = m; from < rows; from += line)
        for (int64_t k = from; k < from + across; k++) largest = vector_max(largest, all[v][k]);
      result_store(&c->result, place + v * LANES, columns - v * LANES, largest);
    }
  }
}

// One tile of the result: sums over `runs` runs of `length` numbers; run r of row m starts at x[r · TILE_ROWS + m].
// Sums are `halves` half vectors wide.
INLINE void compute_tile(const Convolution *c, const int rows, const int halves, const float *const *x, int64_t first,
                         int64_t panel) {
  Vector sums[TILE_ROWS], more[TILE_ROWS];
  HalfVector half[TILE_ROWS];
  const float *bias = c->result.bias ? c->result.bias + panel * PANEL : NULL;
#pragma GCC unroll 16
  for (int m = 0; m < rows; m++) {
    sums[m] = bias ? *(const Vector *)bias : (Vector){};
    if (halves == 4) more[m] = bias ? *(const Vector *)(bias + LANES) : (Vector){};
    if (halves == 3) half[m] = bias ? *(const HalfVector *)(bias + LANES) : (HalfVector){};
  }
  const float *w = c->w + panel * c->runs * c->length * PANEL;
  for (int64_t r = 0; r < c->runs; r++, x += TILE_ROWS) {
    for (int64_t k = 0; k < c->length; k++, w += PANEL) {
#pragma GCC unroll 16
      for (int m = 0; m < rows; m++) {
        float value = x[m][k];
        sums[m] += *(const Vector *)w * value;
        if (halves == 4) more[m] += *(const Vector *)(w + LANES) * value;
        if (halves == 3) half[m] += *(const HalfVector *)(w + LANES) * value;
      }
    }
  }
  int64_t columns = c->out_depth - panel * PANEL;
  if (c->members > 1) {
    Vector all[2][TILE_ROWS];
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++) {
      all[0][m] = sums[m];
      all[1][m] = halves == 4 ? more[m] : halves == 3 ? vector_widened(half[m]) : (Vector){};
    }
    store_largest(c, rows, first * c->out_depth + panel * PANEL, columns, all);
    return;
  }
#pragma GCC unroll 16
  for (int m = 0; m < rows; m++) {
    int64_t place = (first + m) * c->out_depth + panel * PANEL;
    result_store(&c->result, place, columns, sums[m]);
    if (halves == 4) result_store(&c->result, place + LANES, columns - LANES, more[m]);
    if (halves == 3) result_store(&c->result, place + LANES, columns - LANES, vector_widened(half[m]));
  }
}

static void compute(const Convolution *c, int rows, const float *const *x, int64_t first, int64_t panel) {
  int64_t columns = c->out_depth - panel * PANEL;
  switch (rows) {
#define CASE(n)                                                                                    \
  case n:                                                                                          \
    if (columns <= LANES) compute_tile(c, (n), 2, x, first, panel);                                \
    else if (HALVES_PAY && columns <= LANES + LANES / 2) compute_tile(c, (n), 3, x, first, panel); \
    else compute_tile(c, (n), 4, x, first, panel);                                                 \
    break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS > 6
    CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
#undef CASE
  }
}

// The panel of a single row.
static void compute_row(const Convolution *c, const float *x, int64_t panel) {
  Vector sums[2];
  row_times_panel(x, c->length, c->w + panel * c->length * PANEL, sums);
  int64_t place = panel * PANEL;
  for (int v = 0; v < 2 && place < c->out_depth; v++, place += LANES) {
    if (c->result.bias) sums[v] += *(const Vector *)(c->result.bias + place);
    result_store(&c->result, place, c->out_depth - place, sums[v]);
  }
}

// Where a run starts that reaches over an edge of an image: in `zeros` where all of it does, else in `copy`, made here.
static const float *edge_run(const Convolution *c, const float *start, int64_t column, float *copy, const float *zeros) {
  int64_t run_columns = c->length / c->depth, over = column + run_columns - c->width;
  if (column + run_columns <= 0 || column >= c->width) return zeros;
  int64_t left = column < 0 ? -column * c->depth : 0;
  int64_t end = c->length - (over > 0 ? over * c->depth : 0);
  for (int64_t k = 0; k < left; k++) copy[k] = 0;
  for (int64_t k = left; k < end; k++) copy[k] = start[k];
  for (int64_t k = end; k < c->length; k++) copy[k] = 0;
  return copy;
}

// Where one run starts of `count` pixels of one row of the result, the first one's at `start` in column `column`.
static void find_row(const Convolution *c, const float *start, int64_t column, int64_t count, const float **x,
                     float *edges, const float *zeros) {
  int64_t step = c->stride[1], last = c->width - c->length / c->depth, from = 0, to = count;
  if (column < 0) from = (-column + step - 1) / step;
  if (column + (count - 1) * step > last) to = last < column ? 0 : (last - column) / step + 1;
  if (from > count) from = count;
  if (to < from) to = from;
  for (int64_t q = from; q < to; q++) x[q] = start + q * step * c->depth;
  for (int64_t q = 0; q < count; q++) {
    if (q == from) q = to;
    if (q < count) x[q] = edge_run(c, start + q * step * c->depth, column + q * step, edges + q * c->length, zeros);
  }
}

// Where each run starts of `count` pixels of row i and column j on of the result, of the m-th row of a tile on.
static void find_pixels(const Convolution *c, const float *image, int64_t i, int64_t j, int64_t count, int64_t m,
                        const float **x, float *edges, const float *zeros) {
  int64_t run_columns = c->length / c->depth, a = 0, b = 0;
  for (int64_t r = 0; r < c->runs; r++) {
    int64_t row = i * c->stride[0] + a * c->dilation[0] - c->before[0], place = r * TILE_ROWS + m;
    int64_t column = j * c->stride[1] + b * c->dilation[1] - c->before[1];
    if (row >= 0 && row < c->height) {
      const float *start = image + (row * c->width + column) * c->depth;
      find_row(c, start, column, count, x + place, edges + place * c->length, zeros);
    } else {
      for (int64_t q = 0; q < count; q++) x[place + q] = zeros;
    }
    if ((b += run_columns) >= c->columns) b = 0, a++;
  }
}

// Where each run of each row of a tile of `pixels` pixels starts: in the images, in `zeros`, or in its place of `edges`.
static void find_runs(const Convolution *c, int64_t first, int64_t pixels, const float **x, float *edges,
                      const float *zeros) {
  if (c->plain) {
    for (int64_t m = 0; m < pixels; m++) x[m] = c->x + (first + m) * c->depth;
    return;
  }
  int64_t j = first % c->out_width, i = first / c->out_width % c->out_height;
  const float *image = c->x + first / (c->out_width * c->out_height) * c->height * c->width * c->depth;
  for (int64_t m = 0; m < pixels;) {
    int64_t count = pixels - m < c->out_width - j ? pixels - m : c->out_width - j;
    for (int64_t k = 0, across = count * c->pool[1]; k < c->pool[0]; k++)
      find_pixels(c, image, i * c->pool[0] + k, j * c->pool[1], across, m + k * across, x, edges, zeros);
    m += count;
    if ((j += count) == c->out_width) {
      j = 0;
      if (++i == c->out_height) i = 0, image += c->height * c->width * c->depth;
    }
  }
}

static void compute_panels(const Convolution *c, int64_t tile, int64_t from, int64_t to) {
  int64_t line = tile / c->line_tiles, part = tile % c->line_tiles;
  int64_t first = c->line * part / c->line_tiles, count = c->line * (part + 1) / c->line_tiles - first;
  first += line * c->line;
  size_t pointers = c->runs * TILE_ROWS;
  const float **x = team_memory(pointers * sizeof *x + (pointers + 1) * c->length * sizeof(float));
  float *zeros = (float *)(x + pointers);
  if (!c->plain) memset(zeros, 0, c->length * sizeof(float));
  find_runs(c, first, count, x, zeros + c->length, zeros);
  for (int64_t panel = from; panel < to; panel++) {
    if (c->pixels * c->members == 1 && c->runs == 1) compute_row(c, x[0], panel);
    else compute(c, (int)(count * c->members), x, first, panel);
  }
}

static void compute_item(const void *data, int number) {
  const Convolution *c = data;
  Item item = grid_item(&c->grid, number);
  for (int64_t tile = item.tile; tile < item.last_tile; tile++) compute_panels(c, tile, item.panel, item.last_panel);
}

// Operands: x[n, h, w, k], packed weights[panel, a, b, k, PANEL], then bias[panel · PANEL] and addend[n, i, j, c] if any.
// Attribute `window` is int64 {stride, stride, padding before, padding before, dilation, dilation}, `pool` is int64, the
// sizes of pools; the others are those of a result.
XLA_FFI_Error *jaxinfer_convolution(XLA_FFI_CallFrame *call) {
  if (call_answers_version(call)) return NULL;
  const XLA_FFI_Buffer *x = call_operand(call, 0), *w = call_operand(call, 1), *y = call_result(call, 0);
  const int64_t *window = call_array(call, "window", NULL), *pool = call_array(call, "pool", NULL);
  Convolution c = {
      .x = x->data, .w = w->data, .result = result_of(call, 2),
      .height = x->dims[1], .width = x->dims[2], .depth = x->dims[3],
      .out_height = y->dims[1], .out_width = y->dims[2], .out_depth = y->dims[3],
      .rows = w->dims[1], .columns = w->dims[2],
      .stride = {window[0], window[1]}, .before = {window[2], window[3]}, .dilation = {window[4], window[5]},
      .pool = {pool[0], pool[1]}, .members = pool[0] * pool[1],
      .pixels = y->dims[0] * y->dims[1] * y->dims[2],
  };
  if (!c.pixels) return NULL;
  bool together = c.dilation[1] == 1;
  c.runs = together ? c.rows : c.rows * c.columns;
  c.length = together ? c.columns * c.depth : c.depth;
  c.plain = c.members == 1 && c.rows == 1 && c.columns == 1 && c.stride[0] == 1 && c.stride[1] == 1 &&
            c.height == c.out_height && c.width == c.out_width;
  int64_t tile = TILE_ROWS / c.members;
  c.line = c.members > 1 ? c.out_width : c.pixels;
  c.line_tiles = (c.line + tile - 1) / tile;
  c.grid = grid_of(c.pixels / c.line * c.line_tiles, w->dims[0]);
  // Weights that are read for few pixels take longer.
  int64_t work = (c.pixels * c.members + LANES / 4) * c.out_depth * c.runs * c.length;
  team_share(compute_item, &c, grid_items(&c.grid), 1 + (int)(work / WORK_PER_THREAD));
  return NULL;
}

int jaxinfer_panel(void) { return PANEL; }

int jaxinfer_tile_rows(void) { return TILE_ROWS; }
