# The CUDA language and one function that adds a library of kernels. Included when HWKERN_CUDA is ON.

# Set before the language is enabled: CMake's default is what the compiler was built for, which is not what we ship.
set(CMAKE_CUDA_ARCHITECTURES ${HWKERN_ARCHITECTURES})
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR
    "hwkern: GPU kernels were asked for (HWKERN_CUDA=ON, the default), but CMake found no working CUDA compiler. "
    "Install the CUDA toolkit (12.6 or newer) or point CUDACXX at its nvcc; pip with build isolation fetches nvcc by "
    "itself; -Ccmake.define.HWKERN_CUDA=OFF builds without GPU kernels. CMake's log says what it tried.")
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.6)
  message(FATAL_ERROR "hwkern: ${CMAKE_CUDA_COMPILER} is CUDA ${CMAKE_CUDA_COMPILER_VERSION}; 12.6 is the oldest.")
endif()

# Launches and status texts need the runtime's headers in host code; nothing calls find_package(CUDAToolkit), which
# fails on the compiler that pip fetches (it has no libcudart.so).
target_include_directories(hwkern_host SYSTEM PUBLIC ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})

# hwkern_cuda_library(NAME ARCHITECTURES SOURCES...): a static library, so that CMake links the static CUDA runtime
# into the module. No sources, no library.
function(hwkern_cuda_library name architectures)
  if(NOT ARGN)
    return()
  endif()
  add_library(${name} STATIC ${ARGN})
  set_target_properties(${name} PROPERTIES
    CUDA_ARCHITECTURES "${architectures}"
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden)
  # -Xptxas=-v: registers, shared memory and spills of every kernel; scripts/check_ptxas.py reads them from the log.
  target_compile_options(${name} PRIVATE
    -lineinfo -Xptxas=-v -Xcompiler=-Wall,-Wextra --threads=2
    $<$<BOOL:${HWKERN_WERROR}>:-Werror=all-warnings>
    $<$<VERSION_GREATER_EQUAL:${CMAKE_CUDA_COMPILER_VERSION},12.8>:--compress-mode=size>)
  # Both ways: the host code launches kernels, the launchers read the config table. Static libraries may do that.
  target_link_libraries(${name} PRIVATE hwkern_host)
  target_link_libraries(hwkern_host PUBLIC ${name})
endfunction()
