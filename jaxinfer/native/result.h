// What becomes of sums on their way to memory: min(max(sum + addend, low), high).

#ifndef JAXINFER_RESULT_H
#define JAXINFER_RESULT_H

#include <stdint.h>
#include <string.h>

#include "call.h"
#include "vector.h"

typedef struct {
  float *y;
  const float *bias, *addend;  // NULL without one; a bias is what sums begin with
  float low, high;
} Result;

// Reads a result's operands and attributes: bias and addend are the operands from `next` on. `has` is int64
// {1 with a bias, 1 with an addend}, `clamp` is float {low, high}.
static inline Result result_of(const XLA_FFI_CallFrame *call, int next) {
  const int64_t *has = call_array(call, "has", NULL);
  const float *clamp = call_array(call, "clamp", NULL);
  Result result = {.y = call_result(call, 0)->data, .low = clamp[0], .high = clamp[1]};
  if (has[0]) result.bias = call_operand(call, next++)->data;
  if (has[1]) result.addend = call_operand(call, next)->data;
  return result;
}

INLINE Vector load_some(const float *from, int64_t lanes) {
  if (lanes >= LANES) return *(const Vector *)from;
#ifdef __AVX512F__
  return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << lanes) - 1), from);
#else
  Vector value = {};
  memcpy(&value, from, lanes * sizeof(float));
  return value;
#endif
}

INLINE void store_some(float *to, int64_t lanes, Vector value) {
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << lanes) - 1), (__m512)value);
#else
  memcpy(to, &value, lanes * sizeof(float));
#endif
}

// Writes the first lanes of a vector of sums to their place.
INLINE void result_store(const Result *result, int64_t place, int64_t lanes, Vector value) {
  if (result->addend) value += load_some(result->addend + place, lanes);
  Vector low = result->low - (Vector){}, high = result->high - (Vector){};
  value = vector_select(value < low, low, value);  // a NaN stays one
  value = vector_select(value > high, high, value);
  if (lanes >= LANES) *(Vector *)(result->y + place) = value;
  else store_some(result->y + place, lanes, value);
}

#endif
