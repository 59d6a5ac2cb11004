# The only list of kernels and of their flags: one body per operator, compiled once per instruction
# set. Included by the library's build and by that of benchmarks/callgrind.
set(operators critic_stats critic_tail linf_step linf_start l2_step keep_best)

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
find_package(OpenMP COMPONENTS CXX)

set(levels base)
# The baseline is forced down after any CXXFLAGS of the user's, so that -march=native or -mavx2 in
# the environment cannot put AVX into code that every processor runs.
set(base_flags "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(levels base avx2 avx512)
  set(base_flags -march=x86-64 -mtune=generic -mno-avx)
  set(avx2_flags -march=x86-64 -mavx2 -mfma)
  set(avx512_flags -march=x86-64 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma
                   -mprefer-vector-width=512)
endif()

set(kernel_flags -O3 -fno-math-errno -fno-trapping-math -Wall -Wextra)
# linf_step_ and linf_start_ are bitwise equal to torch at every level, l2_step_ is the same at every
# level: a fused multiply-add would round once less.
set(linf_step_flags -ffp-contract=off)
set(linf_start_flags -ffp-contract=off)
set(l2_step_flags -ffp-contract=off)
set(keep_best_flags -ffp-contract=off)
set(critic_stats_flags -ffp-contract=fast)
set(critic_tail_flags -ffp-contract=fast)

# Adds every operator's kernels to a target, at the levels that follow its name.
function(target_kernels target)
  set(folder ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  foreach(level IN LISTS ARGN)
    foreach(operator IN LISTS operators)
      set(source ${folder}/${operator}_${level}.cpp)
      target_sources(${target} PRIVATE ${source})
      set_source_files_properties(${source} PROPERTIES
        COMPILE_OPTIONS "${kernel_flags};${${operator}_flags};${${level}_flags}"
        OBJECT_DEPENDS
          "${folder}/${operator}-inl.h;${folder}/vector-inl.h;${folder}/storage-inl.h")
    endforeach()
  endforeach()
  if(OpenMP_CXX_FOUND)
    target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  endif()
endfunction()
