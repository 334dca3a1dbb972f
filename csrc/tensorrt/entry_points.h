// Plain C functions of both plugin libraries, for ctypes and dlsym.
#pragma once

#include <cstddef>

#define HWKERN_EXPORT __attribute__((visibility("default")))

extern "C" {

// hwkern's version; the text lives as long as the library.
HWKERN_EXPORT const char* hwkern_trt_version();

// Sentences go to `callback` (severity: 1 error, 2 warning, 3 information); null brings back standard error.
HWKERN_EXPORT void hwkern_trt_set_log(void (*callback)(int severity, const char* sentence));

// The last refusal, cut to `bytes` with a final NUL; returns its whole length, 0 when there was none.
HWKERN_EXPORT size_t hwkern_trt_last_error(char* text, size_t bytes);

}  // extern "C"
