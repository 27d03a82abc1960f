// Depthwise convolutions: each channel under a window of its own.
//
// y[n, i, j, c] = clamp(Σ x[n, i·s + a·d − p, j·s + b·d − p, c] · w[a, b, c] + bias[c] + addend[n, i, j, c]), channels last.

#include "call.h"
#include "grid.h"
#include "result.h"
#include "team.h"
#include "vector.h"

// Pixels of a row of the result that are computed together, so that what they read is read once for all of them.
#define TOGETHER 4
// Multiplications that are worth another thread.
#define WORK_PER_THREAD 20000
// Of windows whose pixels are computed together.
#define MOST_COLUMNS 5

typedef struct {
  const float *x, *w;
  Result result;
  int64_t height, width, depth;   // of an image of x, and the channels
  int64_t out_height, out_width;  // of y
  int64_t rows, columns;          // of the window
  int64_t stride[2], before[2], dilation[2];
  int64_t inner_from, inner_to;   // pixels of a row whose whole window lies between left and right edge
  Grid grid;                      // a tile is a row of y
} Depthwise;

// Rows of the window that lie within the image, for one row of the result.
typedef struct {
  const float *image;
  int64_t top, from, to;
  int64_t place;  // of its first pixel in y
} Line;

// TOGETHER pixels from column j on whose windows lie within the image, LANES channels from `channel` on.
INLINE void compute_inner(const Depthwise *c, const Line *line, const int columns, const int stride, int64_t j,
                          int64_t channel) {
  Vector sums[TOGETHER];
#pragma GCC unroll 4
  for (int p = 0; p < TOGETHER; p++)
    sums[p] = c->result.bias ? *(const Vector *)(c->result.bias + channel) : (Vector){};
  for (int64_t a = line->from; a < line->to; a++) {
    int64_t row = line->top + a * c->dilation[0], column = j * stride - c->before[1];
    const float *x = line->image + (row * c->width + column) * c->depth + channel;
    const float *w = c->w + a * columns * c->depth + channel;
    Vector weights[MOST_COLUMNS];
#pragma GCC unroll 8
    for (int b = 0; b < columns; b++) weights[b] = *(const Vector *)(w + b * c->depth);
#pragma GCC unroll 16
    for (int q = 0; q < (TOGETHER - 1) * stride + columns; q++, x += c->depth) {
      Vector value = *(const Vector *)x;
#pragma GCC unroll 4
      for (int p = 0; p < TOGETHER; p++)
        if (q >= p * stride && q < p * stride + columns) sums[p] += value * weights[q - p * stride];
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < TOGETHER; p++)
    result_store(&c->result, line->place + (j + p) * c->depth + channel, LANES, sums[p]);
}

// The pixel in column j, any window.
INLINE void compute_pixel(const Depthwise *c, const Line *line, int64_t j, int64_t channel, int64_t lanes) {
  Vector sum = c->result.bias ? load_some(c->result.bias + channel, lanes) : (Vector){};
  for (int64_t a = line->from; a < line->to; a++) {
    int64_t row = line->top + a * c->dilation[0];
    for (int64_t b = 0; b < c->columns; b++) {
      int64_t column = j * c->stride[1] + b * c->dilation[1] - c->before[1];
      if (column < 0 || column >= c->width) continue;
      const float *x = line->image + (row * c->width + column) * c->depth + channel;
      sum += load_some(c->w + (a * c->columns + b) * c->depth + channel, lanes) * load_some(x, lanes);
    }
  }
  result_store(&c->result, line->place + j * c->depth + channel, lanes, sum);
}

// Channels in steps of LANES; the last step goes back so far that it is whole.
#define FOR_CHANNELS(channel)                                                                 \
  for (int64_t step = 0, channel = 0; step < c->depth && channel <= c->depth - LANES;         \
       step += LANES, channel = step + LANES <= c->depth ? step : c->depth - LANES)

// The pixels from column j on that can be computed together; returns the column after the last of them.
INLINE int64_t compute_together(const Depthwise *c, const Line *line, const int columns, const int stride, int64_t j) {
  for (; j + TOGETHER <= c->inner_to; j += TOGETHER)
    FOR_CHANNELS(channel) compute_inner(c, line, columns, stride, j, channel);
  return j;
}

static int64_t compute_known(const Depthwise *c, const Line *line, int64_t j) {
  if (c->dilation[1] != 1 || c->depth < LANES || j < c->inner_from) return j;
  if (c->columns == 3 && c->stride[1] == 1) return compute_together(c, line, 3, 1, j);
  if (c->columns == 3 && c->stride[1] == 2) return compute_together(c, line, 3, 2, j);
  if (c->columns == 5 && c->stride[1] == 1) return compute_together(c, line, 5, 1, j);
  if (c->columns == 5 && c->stride[1] == 2) return compute_together(c, line, 5, 2, j);
  return j;
}

static void compute_line(const Depthwise *c, int64_t number) {
  int64_t i = number % c->out_height;
  Line line = {.image = c->x + number / c->out_height * c->height * c->width * c->depth,
               .top = i * c->stride[0] - c->before[0], .to = c->rows, .place = number * c->out_width * c->depth};
  while (line.from < line.to && line.top + line.from * c->dilation[0] < 0) line.from++;
  while (line.to > line.from && line.top + (line.to - 1) * c->dilation[0] >= c->height) line.to--;
  for (int64_t j = 0; j < c->out_width;) {
    int64_t next = compute_known(c, &line, j);
    if (next > j) {
      j = next;
      continue;
    }
    if (c->depth < LANES) compute_pixel(c, &line, j, 0, c->depth);
    FOR_CHANNELS(channel) compute_pixel(c, &line, j, channel, LANES);
    j++;
  }
}

static void compute_item(const void *data, int number) {
  const Depthwise *c = data;
  Item item = grid_item(&c->grid, number);
  for (int64_t line = item.tile; line < item.last_tile; line++) compute_line(c, line);
}

// Operands: x[n, h, w, c], w[a, b, c], then bias[c] and addend[n, i, j, c] if any. Attribute `window` is int64
// {stride, stride, padding before, padding before, dilation, dilation}; the others are those of a result.
XLA_FFI_Error *jaxinfer_depthwise(XLA_FFI_CallFrame *call) {
  if (call_answers_version(call)) return NULL;
  const XLA_FFI_Buffer *x = call_operand(call, 0), *w = call_operand(call, 1), *y = call_result(call, 0);
  const int64_t *window = call_array(call, "window", NULL);
  Depthwise c = {
      .x = x->data, .w = w->data, .result = result_of(call, 2),
      .height = x->dims[1], .width = x->dims[2], .depth = x->dims[3],
      .out_height = y->dims[1], .out_width = y->dims[2],
      .rows = w->dims[0], .columns = w->dims[1],
      .stride = {window[0], window[1]}, .before = {window[2], window[3]}, .dilation = {window[4], window[5]},
      .grid = grid_of(y->dims[0] * y->dims[1], 1),
  };
  c.inner_from = (c.before[1] + c.stride[1] - 1) / c.stride[1];
  int64_t last = c.width - 1 + c.before[1] - (c.columns - 1) * c.dilation[1];
  c.inner_to = last < 0 ? 0 : last / c.stride[1] + 1;
  if (c.inner_to > c.out_width) c.inner_to = c.out_width;
  int64_t work = c.grid.tiles * c.out_width * c.depth * c.rows * c.columns;
  team_share(compute_item, &c, grid_items(&c.grid), 1 + (int)(work / WORK_PER_THREAD));
  return NULL;
}
