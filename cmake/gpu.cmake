# The GPU library: csrc/cuda as CUDA, as HIP, or as plain C++ for the tests (BNB_CUDA_EMULATION).

# ----------------------------------------------------------------------------------------------------------------------- sources
# A file belongs to one group. Groups differ in the architectures they are built for; the kernels of all are chosen at run time.

# Every architecture. The bits of quantisers and optimizers are promised: products and sums are rounded apart.
set(BNB_EXACT_SOURCES
    csrc/cuda/runtime.cu
    csrc/cuda/dequantize.cu
    csrc/cuda/optimizer_32bit.cu
    csrc/cuda/optimizer_8bit.cu
    csrc/cuda/paging.cu
    csrc/cuda/int8_quantize.cu
    csrc/cuda/quantize.cu
)
# Every architecture; products may be fused with sums.
set(BNB_GENERIC_SOURCES
    csrc/cuda/gemm_4bit_simple.cu
    csrc/cuda/int8_backward.cu
    csrc/cuda/int8_choice.cu
    csrc/cuda/int8_rows.cu
    csrc/cuda/int8_strided.cu
)
# Tensor cores: any, of sm_75 alone, of sm_80 and later, and of sm_90 alone.
set(BNB_TENSOR_SOURCES
    csrc/cuda/int8_backward_tiles.cu
    csrc/cuda/gemm_4bit_skinny.cu
)
set(BNB_MMA75_SOURCES
    csrc/cuda/int8_tiles_75.cu
)
set(BNB_MMA80_SOURCES
    csrc/cuda/gemm_4bit_backward.cu
    csrc/cuda/gemm_4bit_tiled.cu
    csrc/cuda/int8_tiles.cu
)
set(BNB_SM90_SOURCES
    csrc/cuda/gemm_4bit_warpgroup.cu
    csrc/cuda/gemm_4bit_warpgroup_backward.cu
)
# The C interface, plain C++.
set(BNB_GPU_API_SOURCES
    csrc/api/cuda_api.cpp
    csrc/api/cuda_optimizer_api.cpp
    csrc/api/legacy_cuda_optimizer.cpp
    csrc/api/cuda_int8_api.cpp
    csrc/api/legacy_cuda_int8.cpp
    csrc/api/legacy_cuda_gemm.cpp
    csrc/api/legacy_cuda_quantize.cpp
    csrc/api/cuda_gemm_api.cpp
)

# ---------------------------------------------------------------------------------------------------------------------- emulation
if(BNB_CUDA_EMULATION)
    find_package(Threads REQUIRED)
    set(BNB_EMULATED_SOURCES ${BNB_EXACT_SOURCES} ${BNB_GENERIC_SOURCES} ${BNB_TENSOR_SOURCES} ${BNB_MMA75_SOURCES} ${BNB_MMA80_SOURCES} ${BNB_SM90_SOURCES})
    set_source_files_properties(${BNB_EMULATED_SOURCES} PROPERTIES LANGUAGE CXX)
    add_library(bitsandbytes SHARED csrc/cuda/emulation.cpp csrc/cuda/emulation_hopper.cpp ${BNB_EMULATED_SOURCES} ${BNB_GPU_API_SOURCES})
    set_source_files_properties(csrc/cuda/emulation_hopper.cpp PROPERTIES COMPILE_OPTIONS -O3) # products are large
    target_compile_definitions(bitsandbytes PRIVATE BNB_CUDA_EMULATION=1)
    foreach(group EXACT GENERIC TENSOR MMA75 MMA80 SM90)
        if(BNB_${group}_SOURCES)
            target_compile_definitions(bitsandbytes PRIVATE BNB_HAS_${group}=1)
        endif()
    endforeach()
    # Kernels are written for a compiler that unrolls what it is told to; GCC is told otherwise by its own names.
    target_compile_options(bitsandbytes PRIVATE -O1 -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function -ffp-contract=off -fno-strict-aliasing)
    target_link_libraries(bitsandbytes PRIVATE Threads::Threads)
    set_target_properties(bitsandbytes PROPERTIES PREFIX lib OUTPUT_NAME bitsandbytes_cuda_emulated LIBRARY_OUTPUT_DIRECTORY "${BNB_OUTPUT_DIRECTORY}$<0:>")
    return()
endif()

if(APPLE)
    message(FATAL_ERROR "COMPUTE_BACKEND=${COMPUTE_BACKEND}: there are no such GPUs on macOS. Use COMPUTE_BACKEND=cpu.")
endif()

add_library(bitsandbytes SHARED ${BNB_GPU_API_SOURCES})
target_compile_options(bitsandbytes PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${BNB_COMPILE_OPTIONS}>)
# The runtime library is the one that PyTorch has loaded: no path to that of the toolkit.
set_target_properties(bitsandbytes PROPERTIES
    PREFIX lib
    SKIP_BUILD_RPATH ON
    LIBRARY_OUTPUT_DIRECTORY "${BNB_OUTPUT_DIRECTORY}$<0:>"
    RUNTIME_OUTPUT_DIRECTORY "${BNB_OUTPUT_DIRECTORY}$<0:>"
)
include(CheckLanguage)

# --------------------------------------------------------------------------------------------------------------------------- HIP
if(COMPUTE_BACKEND STREQUAL "hip")
    find_program(BNB_HIPCONFIG hipconfig HINTS ENV ROCM_PATH /opt/rocm PATH_SUFFIXES bin)
    if(NOT BNB_HIPCONFIG)
        message(FATAL_ERROR "COMPUTE_BACKEND=hip: hipconfig, which comes with CMAKE_HIP_COMPILER, the compiler of ROCm, was not found. Install ROCm, or set "
                            "ROCM_PATH to where it is.")
    endif()
    set(ENV{HIP_PLATFORM} amd) # unset, hipconfig names NVIDIA where it sees nvcc
    if(NOT ROCM_VERSION)
        execute_process(COMMAND ${BNB_HIPCONFIG} --version OUTPUT_VARIABLE ROCM_VERSION)
        string(REGEX REPLACE "^([0-9]+)\\.([0-9]+).*" "\\1\\2" ROCM_VERSION "${ROCM_VERSION}")
    endif()
    set(BNB_DEFAULT_ROCM_ARCH gfx90a gfx942 gfx1100 gfx1101 gfx1102 gfx1103 gfx1150 gfx1151 gfx1152 gfx1153 gfx1200 gfx1201)
    if(AMDGPU_TARGETS)
        set(BNB_DEFAULT_ROCM_ARCH ${AMDGPU_TARGETS})
    endif()
    set(BNB_ROCM_ARCH "${BNB_DEFAULT_ROCM_ARCH}" CACHE STRING "AMD architectures to build for")
    set(CMAKE_HIP_ARCHITECTURES "${BNB_ROCM_ARCH}") # unset, CMake asks for the GPU of the machine, which need not have one
    enable_language(HIP)
    message(STATUS "ROCm ${ROCM_VERSION} for ${BNB_ROCM_ARCH}")
    # No tensor cores: the groups for them are left out.
    add_library(kernels_hip OBJECT ${BNB_EXACT_SOURCES} ${BNB_GENERIC_SOURCES})
    set_source_files_properties(${BNB_EXACT_SOURCES} ${BNB_GENERIC_SOURCES} PROPERTIES LANGUAGE HIP)
    set_target_properties(kernels_hip PROPERTIES HIP_STANDARD 17 HIP_STANDARD_REQUIRED ON HIP_VISIBILITY_PRESET hidden)
    # Loops that clang does not unroll, and bounds for launches by nvcc that it does not use, are no reason to warn.
    target_compile_options(kernels_hip PRIVATE -ffp-contract=off -Wall -Wextra -Wno-pass-failed -Wno-unused-const-variable)
    target_link_libraries(bitsandbytes PRIVATE kernels_hip)
    target_compile_definitions(kernels_hip PRIVATE BNB_HAS_EXACT=1 BNB_HAS_GENERIC=1)
    target_compile_definitions(bitsandbytes PRIVATE BNB_HAS_EXACT=1 BNB_HAS_GENERIC=1)
    set_target_properties(bitsandbytes PROPERTIES OUTPUT_NAME bitsandbytes_rocm${ROCM_VERSION} LINKER_LANGUAGE HIP HIP_ARCHITECTURES "${BNB_ROCM_ARCH}")
    return()
endif()

# -------------------------------------------------------------------------------------------------------------------------- CUDA
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "COMPUTE_BACKEND=cuda: CMAKE_CUDA_COMPILER, the CUDA compiler nvcc, was not found. Install the CUDA toolkit, 11.8 to 13, or set "
                        "CUDACXX to the path of nvcc.")
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF) # set for each group below
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

if(CUDAToolkit_VERSION VERSION_LESS 11.8 OR CUDAToolkit_VERSION VERSION_GREATER_EQUAL 14)
    message(FATAL_ERROR "The CUDA toolkit is ${CUDAToolkit_VERSION}; 11.8 up to 13 are supported. Point CUDACXX to another nvcc.")
endif()
set(BNB_CUDA_SHORT_VERSION "${CUDAToolkit_VERSION_MAJOR}${CUDAToolkit_VERSION_MINOR}")
set(CUDA_VERSION "${BNB_CUDA_SHORT_VERSION}" CACHE STRING "The toolkit that is expected, without its dot, such as 130")
if(NOT CUDA_VERSION STREQUAL BNB_CUDA_SHORT_VERSION)
    message(FATAL_ERROR "CUDA_VERSION is ${CUDA_VERSION}, but the toolkit found is ${CUDAToolkit_VERSION} (${BNB_CUDA_SHORT_VERSION}). Point CUDACXX to the nvcc "
                        "that is wanted, or leave CUDA_VERSION out.")
endif()

# Architectures, ascending: what this toolkit can build for, unless the user names them.
set(BNB_ALL_ARCHITECTURES 75 80 86 89 90)
if(CUDAToolkit_VERSION VERSION_LESS 13)
    list(PREPEND BNB_ALL_ARCHITECTURES 60 70)
endif()
if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND BNB_ALL_ARCHITECTURES 100 120)
endif()
set(COMPUTE_CAPABILITY "${BNB_ALL_ARCHITECTURES}" CACHE STRING "Compute capabilities to build for, without the dot, such as \"80;90\"")
option(PTXAS_VERBOSE "Show registers, spills and shared memory of every kernel" OFF)
list(SORT COMPUTE_CAPABILITY COMPARE NATURAL)
list(REMOVE_DUPLICATES COMPUTE_CAPABILITY)
foreach(capability IN LISTS COMPUTE_CAPABILITY)
    if(NOT capability MATCHES "^[1-9][0-9]+$")
        message(FATAL_ERROR "COMPUTE_CAPABILITY must hold numbers such as 75;80;90, got '${capability}'")
    endif()
endforeach()
message(STATUS "CUDA ${CUDAToolkit_VERSION} for compute capabilities ${COMPUTE_CAPABILITY}")

# Sets `result` to what CMAKE_CUDA_ARCHITECTURES wants for those chosen capabilities that lie between two: machine code for each, and for the newest one
# chosen at all also the form that later GPUs can translate.
function(architectures_between low high result)
    set(architectures)
    list(GET COMPUTE_CAPABILITY -1 newest)
    foreach(capability IN LISTS COMPUTE_CAPABILITY)
        if(capability GREATER_EQUAL low AND capability LESS_EQUAL high)
            if(capability EQUAL newest)
                list(APPEND architectures ${capability})
            else()
                list(APPEND architectures ${capability}-real)
            endif()
        endif()
    endforeach()
    set(${result} "${architectures}" PARENT_SCOPE)
endfunction()

# add_gpu_kernels(<group> <architectures> <sources> [flags...]): a group of kernels, unless it has no sources or none of its architectures is wanted.
# Defines BNB_HAS_<GROUP> for the interface and the other groups, which choose at run time among what there is.
function(add_gpu_kernels group architectures sources)
    if(NOT sources OR NOT architectures)
        return()
    endif()
    string(TOLOWER ${group} name)
    add_library(kernels_${name} OBJECT ${sources})
    set_target_properties(kernels_${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                          CUDA_VISIBILITY_PRESET hidden POSITION_INDEPENDENT_CODE ON)
    target_compile_options(kernels_${name} PRIVATE ${ARGN} $<$<BOOL:${PTXAS_VERBOSE}>:-Xptxas=-v>)
    if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 13)
        target_compile_options(kernels_${name} PRIVATE --compress-mode=size)
    endif()
    if(MSVC)
        target_compile_options(kernels_${name} PRIVATE -Xcompiler=/Zc:preprocessor)
    endif()
    target_sources(bitsandbytes PRIVATE $<TARGET_OBJECTS:kernels_${name}>)
    set_property(GLOBAL APPEND PROPERTY BNB_GPU_GROUPS ${group})
endfunction()

architectures_between(0 999 BNB_ARCHITECTURES)
architectures_between(75 999 BNB_ARCHITECTURES_TENSOR)
architectures_between(75 79 BNB_ARCHITECTURES_75)
architectures_between(80 999 BNB_ARCHITECTURES_80)
set(BNB_ARCHITECTURES_90)
if(90 IN_LIST COMPUTE_CAPABILITY AND CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12)
    set(BNB_ARCHITECTURES_90 90a-real) # this code runs on 9.0 and nowhere else
endif()

add_gpu_kernels(EXACT "${BNB_ARCHITECTURES}" "${BNB_EXACT_SOURCES}" --fmad=false)
add_gpu_kernels(GENERIC "${BNB_ARCHITECTURES}" "${BNB_GENERIC_SOURCES}")
add_gpu_kernels(TENSOR "${BNB_ARCHITECTURES_TENSOR}" "${BNB_TENSOR_SOURCES}")
add_gpu_kernels(MMA75 "${BNB_ARCHITECTURES_75}" "${BNB_MMA75_SOURCES}")
add_gpu_kernels(MMA80 "${BNB_ARCHITECTURES_80}" "${BNB_MMA80_SOURCES}")
add_gpu_kernels(SM90 "${BNB_ARCHITECTURES_90}" "${BNB_SM90_SOURCES}")

get_property(groups GLOBAL PROPERTY BNB_GPU_GROUPS)
foreach(target IN ITEMS bitsandbytes LISTS groups)
    if(NOT target STREQUAL "bitsandbytes")
        string(TOLOWER kernels_${target} target)
    endif()
    foreach(group IN LISTS groups)
        target_compile_definitions(${target} PRIVATE BNB_HAS_${group}=1)
    endforeach()
endforeach()

target_link_libraries(bitsandbytes PRIVATE CUDA::cudart)
set_target_properties(bitsandbytes PROPERTIES OUTPUT_NAME bitsandbytes_cuda${BNB_CUDA_SHORT_VERSION} CUDA_ARCHITECTURES OFF)
