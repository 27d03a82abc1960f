// What XLA hands to a kernel: operands, results and attributes.

#ifndef JAXINFER_CALL_H
#define JAXINFER_CALL_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

// XLA asks once which version of its interface a kernel was made for; true if this call is that question, now answered.
static inline bool call_answers_version(XLA_FFI_CallFrame *call) {
  if (!call->extension_start || call->extension_start->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)call->extension_start)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return true;
}

static inline const XLA_FFI_Buffer *call_operand(const XLA_FFI_CallFrame *call, int i) { return call->args.args[i]; }

static inline const XLA_FFI_Buffer *call_result(const XLA_FFI_CallFrame *call, int i) { return call->rets.rets[i]; }

// An attribute that is an array, found by name; its elements and, if asked for, how many there are.
static inline const void *call_array(const XLA_FFI_CallFrame *call, const char *name, int64_t *size) {
  const XLA_FFI_Attrs *attrs = &call->attrs;
  for (int64_t i = 0; i < attrs->size; i++) {
    if (attrs->names[i]->len == strlen(name) && !memcmp(attrs->names[i]->ptr, name, attrs->names[i]->len)) {
      const XLA_FFI_Array *array = attrs->attrs[i];
      if (size) *size = array->size;
      return array->data;
    }
  }
  if (size) *size = 0;
  return NULL;
}

#endif
