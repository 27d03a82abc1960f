// Loops over vectors: recurrent cells of one row, for all their steps.
//
// A loop is a list of instructions, each on vectors: elementwise ones, and products with packed weights, which the team
// shares so that each core meets the same weights in each step. Vectors lie in spaces: space 0 is the loop's own
// memory, then come the operands, then the results. What belongs to one step moves on from step to step.

#include <stdlib.h>

#include "call.h"
#include "result.h"
#include "row.h"
#include "team.h"
#include "vector.h"
#include "vector_math.h"

// As in loop.py.
enum Operation { COPY, NEG, ABS, EXP, TANH, LOGISTIC, ADD, SUB, MUL, DIV, MAX, MIN, PRODUCT };

#define MOST_SPACES 64
// Weights that are worth another thread.
#define WORK_PER_THREAD 15000

// A vector from `offset` on.
typedef struct {
  int32_t space, offset;
} Place;

// to = operation(a, b), `size` elements. Of a product, a is a vector and b are weights of `depth` rows.
typedef struct {
  int32_t operation, size, depth;
  Place to, a, b;
} Instruction;

typedef struct {
  const float *x, *w;
  float *y;
  int64_t depth, size;
} Product;

static void compute_panel(const void *data, int item) {
  const Product *p = data;
  Vector sums[2];
  row_times_panel(p->x, p->depth, p->w + item * p->depth * PANEL, sums);
  for (int64_t v = 0, place = item * PANEL; v < 2 && place < p->size; v++, place += LANES) {
    if (p->size - place >= LANES) *(Vector *)(p->y + place) = sums[v];
    else store_some(p->y + place, p->size - place, sums[v]);
  }
}

INLINE Vector apply(const int operation, Vector a, Vector b) {
  switch (operation) {
    case NEG: return -a;
    case ABS: return vector_abs(a);
    case EXP: return vector_exp(a);
    case TANH: return vector_tanh(a);
    case LOGISTIC: return vector_logistic(a);
    case ADD: return a + b;
    case SUB: return a - b;
    case MUL: return a * b;
    case DIV: return a / b;
    case MAX: return vector_max(a, b);
    case MIN: return vector_min(a, b);
    default: return a;
  }
}

INLINE void compute_elements(const int operation, int64_t size, float *to, const float *a, const float *b) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    *(Vector *)(to + i) = apply(operation, *(const Vector *)(a + i), *(const Vector *)(b + i));
  if (i < size)
    store_some(to + i, size - i, apply(operation, load_some(a + i, size - i), load_some(b + i, size - i)));
}

static void compute(const Instruction *instruction, float *const *spaces) {
  float *to = spaces[instruction->to.space] + instruction->to.offset;
  float *a = spaces[instruction->a.space] + instruction->a.offset;
  float *b = spaces[instruction->b.space] + instruction->b.offset;
  int64_t size = instruction->size;
  switch (instruction->operation) {
#define CASE(operation) \
  case operation: compute_elements(operation, size, to, a, b); break;
    CASE(COPY) CASE(NEG) CASE(ABS) CASE(EXP) CASE(TANH) CASE(LOGISTIC)
    CASE(ADD) CASE(SUB) CASE(MUL) CASE(DIV) CASE(MAX) CASE(MIN)
#undef CASE
    case PRODUCT: {
      Product product = {a, b, to, instruction->depth, size};
      int panels = (int)((size + PANEL - 1) / PANEL);
      team_share(compute_panel, &product, panels, 1 + (int)(product.depth * size / WORK_PER_THREAD));
    }
  }
}

// Attributes: `code` is int32, the instructions that begin the loop, those of a step, and those that end it; `parts` is
// int64 {how many of each, steps, 1 if they run backwards, floats of its own}; `advance` is int64, how many floats each
// space moves on in a step.
XLA_FFI_Error *jaxinfer_loop(XLA_FFI_CallFrame *call) {
  if (call_answers_version(call)) return NULL;
  const Instruction *code = call_array(call, "code", NULL);
  const int64_t *parts = call_array(call, "parts", NULL), *advance = call_array(call, "advance", NULL);
  int64_t steps = parts[3], spaces = 1 + call->args.size + call->rets.size;
  float *at[MOST_SPACES];
  at[0] = aligned_alloc(64, parts[5] * sizeof(float) / 64 * 64 + 64);
  if (!at[0]) abort();
  for (int64_t i = 0; i < call->args.size; i++) at[1 + i] = call_operand(call, (int)i)->data;
  for (int64_t i = 0; i < call->rets.size; i++) at[1 + call->args.size + i] = call_result(call, (int)i)->data;
  if (parts[4])
    for (int64_t s = 0; s < spaces; s++) at[s] += advance[s] * (steps - 1);
  for (int64_t i = 0; i < parts[0]; i++) compute(code++, at);
  for (int64_t step = 0; step < steps; step++) {
    for (int64_t i = 0; i < parts[1]; i++) compute(code + i, at);
    for (int64_t s = 0; s < spaces; s++) at[s] += parts[4] ? -advance[s] : advance[s];
  }
  code += parts[1];
  for (int64_t i = 0; i < parts[2]; i++) compute(code++, at);
  free(at[0]);
  return NULL;
}
