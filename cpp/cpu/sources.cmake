# What the CPU kernels are compiled from, for whoever compiles them: QLORA_CPU_SOURCES, each part of an instruction set with
# the set's flags, and QLORA_CPU_DEFINITIONS.
set(QLORA_CPU_ISAS "" CACHE STRING "instruction sets to compile for besides scalar, such as avx2;avx512; empty: all; native: \
this processor's best, and AVX2 or NEON")
set(QLORA_CPU_ISAS_NOT_RUN "" CACHE STRING "instruction sets to compile with -O1, which is faster: this machine lacks them")
set(_cpu "${CMAKE_CURRENT_LIST_DIR}")
file(GLOB QLORA_CPU_SOURCES CONFIGURE_DEPENDS "${_cpu}/*.cpp" "${_cpu}/*/*.cpp" "${_cpu}/../format/*.cpp")
set(_x86 0)
set(_arm64 0)
set(_isas scalar)
set(_isas_x86_64 avx2 avx_vnni avx512 avx512_bf16 amx_bf16)
set(_isas_aarch64 neon neon_dotprod neon_bf16 neon_i8mm)
# Sets whose table begins as a copy of another one's.
set(_base_avx_vnni avx2)
set(_base_amx_bf16 avx512_bf16)
set(_base_neon_dotprod neon)
set(_base_neon_i8mm neon_bf16)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(_x86 1)
  list(APPEND _isas ${_isas_x86_64})
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  set(_arm64 1)
  list(APPEND _isas ${_isas_aarch64})
endif()
set(_chosen ${QLORA_CPU_ISAS})
set(_not_run ${QLORA_CPU_ISAS_NOT_RUN})
if(QLORA_CPU_ISAS STREQUAL "native")
  # isa.cpp says what it will choose when the kernels run.
  string(REGEX REPLACE "([^;]+);?" "QLORA_SET(\\1) " _sets "${_isas}")
  file(CONFIGURE OUTPUT native_isas.cpp CONTENT [[
#define QLORA_X86 @_x86@
#define QLORA_ARM64 @_arm64@
#define QLORA_CPU_ISAS @_sets@
#include "cpp/cpu/isa/isa.cpp"
#include <cstdio>
int main() {
  std::fputs(qlora::cpu::current_isa().name, stdout);
}
]] @ONLY)
  set(_library "$<$<PLATFORM_ID:Linux>:stdc++>") # CXX=gcc compiles C++ but does not link it
  try_run(_ran _built SOURCES "${CMAKE_CURRENT_BINARY_DIR}/native_isas.cpp" NO_CACHE
          CMAKE_FLAGS "-DINCLUDE_DIRECTORIES=${_cpu}/../.." RUN_OUTPUT_VARIABLE _best
          LINK_LIBRARIES ${_library}
          COMPILE_OUTPUT_VARIABLE _errors CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON)
  if(NOT _built OR NOT _ran EQUAL 0)
    message(FATAL_ERROR "QLORA_CPU_ISAS=native: the program that finds this processor's instruction sets failed: ${_ran} "
                        "${_errors}")
  endif()
  # Beside the best one, AVX2 or NEON and scalar: for tests, and for other processors to which the build is copied.
  list(SUBLIST _isas 0 2 _not_run)
  set(_chosen ${_best} ${_not_run})
  list(REMOVE_ITEM _not_run ${_best} ${_base_${_best}})
endif()
if(_chosen)
  foreach(_isa IN LISTS _chosen)
    if(NOT _isa IN_LIST _isas)
      message(FATAL_ERROR "QLORA_CPU_ISAS: expected some of ${_isas}, got ${_isa}")
    endif()
  endforeach()
  set(_wanted scalar ${_chosen})
  foreach(_isa IN LISTS _wanted)
    list(APPEND _wanted ${_base_${_isa}})
  endforeach()
  foreach(_isa IN LISTS _isas)
    if(NOT _isa IN_LIST _wanted)
      list(REMOVE_ITEM _isas ${_isa})
    endif()
  endforeach()
endif()
message(STATUS "CPU instruction sets: ${_isas}")
# cpp/format/code_tables.h searches its multipliers at compile time, for longer than Clang lets a constant take by default.
add_compile_options($<$<COMPILE_LANG_AND_ID:CXX,Clang,AppleClang>:-fconstexpr-steps=33554432>)
# Of the tables of instruction sets, those of the sets that are compiled.
list(FILTER QLORA_CPU_SOURCES EXCLUDE REGEX "/isa_[^/]*\\.cpp$")
set(_sets "")
foreach(_isa IN LISTS _isas)
  list(APPEND QLORA_CPU_SOURCES "${_cpu}/isa_${_isa}.cpp")
  string(APPEND _sets "QLORA_SET(${_isa}) ")
endforeach()
string(STRIP "${_sets}" _sets)
set(QLORA_CPU_DEFINITIONS QLORA_X86=${_x86} QLORA_ARM64=${_arm64} "QLORA_CPU_ISAS=${_sets}")
list(REVERSE _isas)  # Ninja starts in this order, so the files that take longest come first

# The flags of each instruction set, which only its own parts are compiled with. Parts include intrinsics and our own
# headers only: weak copies of std or torch templates compiled for a newer processor could be the ones the linker keeps.
set(_scalar)
set(_avx2 -mavx2 -mfma -mf16c)
set(_avx_vnni ${_avx2} -mavxvnni)
set(_avx512 ${_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mprefer-vector-width=512)
set(_avx512_bf16 ${_avx512} -mavx512bf16)
set(_amx_bf16 ${_avx512_bf16} -mamx-tile -mamx-bf16 -mamx-int8)
set(_neon)
set(_neon_dotprod -march=armv8-a+dotprod)
set(_neon_bf16 -march=armv8-a+bf16+dotprod)
set(_neon_i8mm -march=armv8-a+bf16+dotprod+i8mm)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Before it allocates registers GCC moves loads to the head of a loop: where all are used, some are spilled for that.
  list(APPEND _neon -fno-schedule-insns)
  list(APPEND _neon_dotprod -fno-schedule-insns)
  list(APPEND _neon_bf16 -fno-schedule-insns)
  list(APPEND _neon_i8mm -fno-schedule-insns)
endif()
foreach(_isa IN LISTS _not_run)
  list(APPEND _${_isa} -O1)
endforeach()

# The parts of each instruction set (parts/parts.h). They are compiled as four files, the many-token parts, those of
# offsets and those of int8 apart from the others, so that the compiler needs at most 3.5 GB for a file. Where QLORA_CPU_PARTS_APART is set
# each part is a file: with the checks of QLORA_SANITIZE a part takes as much as several without. The machine code is not
# quite the same, since what is inlined depends on all that a file holds.
set(_few_tokens few_tokens_dx_float few_tokens_forward_int few_tokens_forward_float few_tokens_wide few_tokens_offsets)
set(_many_tokens many_tokens_forward many_tokens_dx many_tokens_dlora many_tokens_dense)
set(_parts_scalar codec ${_few_tokens} few_tokens_forward_int8 few_tokens_dx_int few_tokens_forward_bf16 ${_many_tokens} many_tokens_int many_tokens_int8)
set(_parts_avx2 codec ${_few_tokens} few_tokens_forward_int8 ${_many_tokens} many_tokens_int many_tokens_int8)
set(_parts_avx_vnni few_tokens_forward_int few_tokens_forward_int8 many_tokens_int many_tokens_int8)
set(_parts_avx512 codec ${_few_tokens} few_tokens_forward_int8 few_tokens_dx_int ${_many_tokens} many_tokens_int many_tokens_int8)
set(_parts_avx512_bf16 codec ${_few_tokens} few_tokens_forward_int8 few_tokens_dx_int many_tokens_bf16 ${_many_tokens} many_tokens_int many_tokens_int8)
set(_parts_amx_bf16 many_tokens_tiles many_tokens_tiles_int8)
set(_parts_neon codec ${_few_tokens} few_tokens_forward_int8 ${_many_tokens} many_tokens_int8)
set(_parts_neon_dotprod few_tokens_forward_int8 many_tokens_int8)
set(_parts_neon_i8mm few_tokens_forward_matrices few_tokens_forward_int8 many_tokens_int8)
set(_parts_neon_bf16 codec ${_few_tokens} few_tokens_forward_int8 few_tokens_forward_bf16 many_tokens_bf16 ${_many_tokens} many_tokens_int8)
function(_add_cpu_file name isa)  # and the parts that it has
  set(_content "")
  foreach(_part IN LISTS ARGN)
    string(APPEND _content "#include \"cpp/cpu/parts/${_part}-inl.h\"\n")
  endforeach()
  set(_file "${CMAKE_CURRENT_BINARY_DIR}/parts/${name}.cpp")
  file(CONFIGURE OUTPUT "${_file}" CONTENT "${_content}")
  set_source_files_properties("${_file}" PROPERTIES COMPILE_OPTIONS "${_${isa}}" COMPILE_DEFINITIONS QLORA_ISA=${isa})
  set(QLORA_CPU_SOURCES ${QLORA_CPU_SOURCES} "${_file}" PARENT_SCOPE)
endfunction()
foreach(_isa IN LISTS _isas)
  if(QLORA_CPU_PARTS_APART)
    foreach(_part IN LISTS _parts_${_isa})
      _add_cpu_file(${_isa}_${_part} ${_isa} ${_part})
    endforeach()
  else()
    set(_many ${_parts_${_isa}})
    list(FILTER _many INCLUDE REGEX "^many_tokens")
    list(FILTER _many EXCLUDE REGEX "_int8$")
    set(_others ${_parts_${_isa}})
    list(FILTER _others EXCLUDE REGEX "^many_tokens|_offsets$|_int8$")
    set(_offsets ${_parts_${_isa}})
    list(FILTER _offsets INCLUDE REGEX "_offsets$")
    set(_int8 ${_parts_${_isa}})
    list(FILTER _int8 INCLUDE REGEX "_int8$")
    if(_many)
      _add_cpu_file(${_isa}_many_tokens ${_isa} ${_many})
    endif()
    if(_others)
      _add_cpu_file(${_isa}_few_tokens ${_isa} ${_others})
    endif()
    if(_offsets)
      _add_cpu_file(${_isa}_offsets ${_isa} ${_offsets})
    endif()
    if(_int8)
      _add_cpu_file(${_isa}_int8 ${_isa} ${_int8})
    endif()
  endif()
endforeach()
