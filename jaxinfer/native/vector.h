// Vectors as long as this processor's, and how many accumulators its registers hold.

#ifndef JAXINFER_VECTOR_H
#define JAXINFER_VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define TILE_ROWS 14
#define HALVES_PAY 1  // two operations on half vectors take the time of one on whole ones
#elif defined(__AVX__)
#define LANES 8
#define TILE_ROWS 6
#elif defined(__aarch64__)
#define LANES 4
#define TILE_ROWS 14
#else
#define LANES 4
#define TILE_ROWS 6
#endif

#ifndef HALVES_PAY
#define HALVES_PAY 0
#endif

// Columns of a panel of packed weights.
#define PANEL (2 * LANES)

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

typedef int32_t Mask __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

typedef float HalfVector __attribute__((vector_size(LANES * sizeof(float) / 2), aligned(sizeof(float))));

#define INLINE static inline __attribute__((always_inline))

// A half vector as the first half of a whole one.
INLINE Vector vector_widened(HalfVector half) {
#ifdef __AVX512F__
  return (Vector)_mm512_zextps256_ps512((__m256)half);
#else
  Vector whole = {};
  memcpy(&whole, &half, sizeof half);
  return whole;
#endif
}

// Of each lane the one value where the mask is set, else the other.
INLINE Vector vector_select(Mask mask, Vector set, Vector clear) {
  return (Vector)(((Mask)set & mask) | ((Mask)clear & ~mask));
}

#endif
