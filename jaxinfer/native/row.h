// One row times a panel of packed weights.

#ifndef JAXINFER_ROW_H
#define JAXINFER_ROW_H

#include <stdint.h>

#include "vector.h"

// sums = Σ x[k] · w[k, PANEL]. Each weight is read once, so what counts is how fast they come: sums of four rows of
// weights are kept apart, which need not wait for each other.
INLINE void row_times_panel(const float *x, int64_t depth, const float *w, Vector sums[2]) {
  Vector a[4] = {}, b[4] = {};
  int64_t k = 0;
  for (; k + 3 < depth; k += 4, w += 4 * PANEL) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      a[i] += *(const Vector *)(w + i * PANEL) * x[k + i];
      b[i] += *(const Vector *)(w + i * PANEL + LANES) * x[k + i];
    }
  }
  for (; k < depth; k++, w += PANEL) {
    a[0] += *(const Vector *)w * x[k];
    b[0] += *(const Vector *)(w + LANES) * x[k];
  }
  sums[0] = (a[0] + a[1]) + (a[2] + a[3]);
  sums[1] = (b[0] + b[1]) + (b[2] + b[3]);
}

#endif
