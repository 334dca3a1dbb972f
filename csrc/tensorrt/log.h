// How the plugins say what is wrong. TensorRT's own logger cannot be called: its vtable changed at 11.0, and one binary
// serves 10.1 to 11.x. A sentence goes to the callback that the host program set, else to standard error, and the last
// one is kept for whoever gets no more than "plugin creation failed" from TensorRT.
#pragma once

#include <cstddef>

namespace hwkern::trt {

// Numbers of nvinfer1::ILogger::Severity.
enum Severity : int { kError = 1, kWarning = 2, kInfo = 3 };

using LogCallback = void (*)(int severity, const char* sentence);

void set_log(LogCallback callback);  // null: back to standard error
void log(Severity severity, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Logs an error, keeps it as the last one, and returns false, so that a check reads `return refuse("…")`.
bool refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Copies the last refusal of any thread, cut to `bytes` with a final NUL; returns its whole length.
size_t last_error(char* text, size_t bytes);

}  // namespace hwkern::trt
