// Calls kernels on arrays that end where memory of others begins, and compares with sums in the plainest loops.
//
// Each line of the input is one call: kernel (0 packed, 1 depthwise), images, height, width, depth, window (2),
// features, strides (2), padding before and after along both axes (4), dilation (2), 1 with a bias, 1 with an addend,
// sizes of pools (2).
// The numbers in the arrays are small and whole, so that sums are exact in whatever order.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "call.h"
#include "team.h"

XLA_FFI_Error *jaxinfer_convolution(XLA_FFI_CallFrame *call);
XLA_FFI_Error *jaxinfer_depthwise(XLA_FFI_CallFrame *call);
int jaxinfer_panel(void);

enum { MOST_OPERANDS = 4 };

typedef struct {
  int kernel, n, height, width, depth, rows, columns, features;
  int stride[2], before[2], after[2], dilation[2], bias, addend, pool[2];
} Case;

static unsigned state = 1;

// A whole number from -4 to 4.
static float draw(void) {
  state = state * 1664525u + 1013904223u;
  return (float)((int)(state >> 16) % 5) - (float)((int)(state >> 24) % 5);
}

static float *array(int64_t size) {
  float *numbers = malloc(size * sizeof *numbers);
  for (int64_t i = 0; i < size; i++) numbers[i] = draw();
  return numbers;
}

static int positions(int size, int before, int after, int window, int dilation, int stride) {
  int room = size + before + after - (window - 1) * dilation - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// Weights as the packed kernel takes them; what fills up the last panel must not reach any result.
static float *packed(const Case *c, const float *w, int panels, int panel) {
  int64_t size = (int64_t)c->rows * c->columns * c->depth;
  float *filled = array(size * panels * panel);
  for (int64_t k = 0; k < size; k++)
    for (int f = 0; f < c->features; f++) filled[(f / panel * size + k) * panel + f % panel] = w[k * c->features + f];
  return filled;
}

static float plain(const Case *c, const float *x, const float *w, int n, int i, int j, int f) {
  float sum = 0;
  for (int a = 0; a < c->rows; a++) {
    for (int b = 0; b < c->columns; b++) {
      int row = i * c->stride[0] + a * c->dilation[0] - c->before[0];
      int column = j * c->stride[1] + b * c->dilation[1] - c->before[1];
      if (row < 0 || row >= c->height || column < 0 || column >= c->width) continue;
      const float *pixel = x + (((int64_t)n * c->height + row) * c->width + column) * c->depth;
      const float *weights = w + (int64_t)(a * c->columns + b) * c->depth * (c->kernel ? 1 : c->features);
      if (c->kernel) sum += pixel[f] * weights[f];
      for (int k = 0; k < c->depth && !c->kernel; k++) sum += pixel[k] * weights[k * c->features + f];
    }
  }
  return sum;
}

static float largest(const Case *c, const float *x, const float *w, int n, int i, int j, int f) {
  float found = plain(c, x, w, n, i * c->pool[0], j * c->pool[1], f);
  for (int a = 0; a < c->pool[0]; a++) {
    for (int b = 0; b < c->pool[1]; b++) {
      float other = plain(c, x, w, n, i * c->pool[0] + a, j * c->pool[1] + b, f);
      found = other > found ? other : found;
    }
  }
  return found;
}

static int try(const Case *c) {
  int height = positions(c->height, c->before[0], c->after[0], c->rows, c->dilation[0], c->stride[0]) / c->pool[0];
  int width = positions(c->width, c->before[1], c->after[1], c->columns, c->dilation[1], c->stride[1]) / c->pool[1];
  int features = c->kernel ? c->depth : c->features, panel = jaxinfer_panel(), panels = (features + panel - 1) / panel;
  int64_t size = (int64_t)c->n * height * width * features;
  float *x = array((int64_t)c->n * c->height * c->width * c->depth), *y = array(size), *addend = array(size);
  float *w = array((int64_t)c->rows * c->columns * c->depth * (c->kernel ? 1 : features));
  float *given = c->kernel ? w : packed(c, w, panels, panel), *bias = array(c->kernel ? features : panels * panel);
  float clamp[] = {-20, 30};
  int64_t has[] = {c->bias, c->addend};
  int64_t window[] = {c->stride[0], c->stride[1], c->before[0], c->before[1], c->dilation[0], c->dilation[1]};
  int64_t pool[] = {c->pool[0], c->pool[1]};

  XLA_FFI_Buffer buffers[MOST_OPERANDS + 1] = {
      {.data = x, .rank = 4, .dims = (int64_t[]){c->n, c->height, c->width, c->depth}},
      {.data = given, .rank = c->kernel ? 3 : 5,
       .dims = c->kernel ? (int64_t[]){c->rows, c->columns, c->depth}
                         : (int64_t[]){panels, c->rows, c->columns, c->depth, panel}}};
  int operands = 2;
  if (c->bias) buffers[operands++].data = bias;
  if (c->addend) buffers[operands++].data = addend;
  buffers[operands] = (XLA_FFI_Buffer){.data = y, .rank = 4, .dims = (int64_t[]){c->n, height, width, features}};
  void *args[MOST_OPERANDS], *result = &buffers[operands];
  for (int i = 0; i < operands; i++) args[i] = &buffers[i];
  XLA_FFI_Array arrays[] = {{.size = 2, .data = clamp}, {.size = 2, .data = has}, {.size = 2, .data = pool},
                            {.size = 6, .data = window}};
  XLA_FFI_ByteSpan names[] = {{"clamp", 5}, {"has", 3}, {"pool", 4}, {"window", 6}};
  XLA_FFI_CallFrame call = {
      .args = {.size = operands, .args = args},
      .rets = {.size = 1, .rets = &result},
      .attrs = {.size = 4, .names = (XLA_FFI_ByteSpan *[]){names, names + 1, names + 2, names + 3},
                .attrs = (void *[]){arrays, arrays + 1, arrays + 2, arrays + 3}}};
  if ((c->kernel ? jaxinfer_depthwise : jaxinfer_convolution)(&call)) return 1;

  int wrong = 0;
  for (int64_t place = 0; place < size; place++) {
    int f = place % features, j = place / features % width, i = place / features / width % height;
    float want = largest(c, x, w, (int)(place / features / width / height), i, j, f);
    want += (c->bias ? bias[f] : 0) + (c->addend ? addend[place] : 0);
    want = want < clamp[0] ? clamp[0] : want > clamp[1] ? clamp[1] : want;
    if (y[place] != want && !wrong++) fprintf(stderr, "y[%d, %d, %d] is %g, not %g\n", i, j, f, y[place], want);
  }
  if (!c->kernel) free(given);
  free(x), free(y), free(addend), free(w), free(bias);
  return wrong;
}

int main(void) {
  char line[256];
  int count = 0, wrong = 0;
  team_resize(3);
  while (fgets(line, sizeof line, stdin)) {
    Case c;
    int *number[] = {&c.kernel, &c.n, &c.height, &c.width, &c.depth, &c.rows, &c.columns, &c.features, &c.stride[0],
                     &c.stride[1], &c.before[0], &c.after[0], &c.before[1], &c.after[1], &c.dilation[0], &c.dilation[1],
                     &c.bias, &c.addend, &c.pool[0], &c.pool[1]};
    char *rest = line;
    for (size_t i = 0; i < sizeof number / sizeof *number; i++) *number[i] = (int)strtol(rest, &rest, 10);
    count++;
    if (try(&c) && ++wrong) fprintf(stderr, "wrong: %s", line);
  }
  printf("%d calls, panels of %d\n", count, jaxinfer_panel());
  return wrong != 0;
}
