# The stand-in libraries. The core comes from src/core/core.mk as $(BUILD)/libcudasim_core.a.
RT := src/runtime
RT_OUT := $(BUILD)/runtime
RT_CORE ?= $(BUILD)/libcudasim_core.a
RT_CXXFLAGS := -std=c++20 -O2 -g1 -fPIC -Wall -Wextra -fvisibility=hidden -Wno-deprecated-declarations \
  -Iinclude -isystem $(CUDA_HOME)/include
# They depend on libc only, because they are preloaded into every process of a test run.
RT_LDFLAGS := -shared -static-libstdc++ -static-libgcc -Wl,--no-undefined -Wl,-Bsymbolic -Wl,-z,now -ldl -lpthread -lm

RT_CUDART_OBJECTS := $(addprefix $(RT_OUT)/,error.o device.o memory.o stream.o graph.o fatbin.o module.o launch.o driver.o torch_hook.o)
RT_BLAS_OBJECTS := $(addprefix $(RT_OUT)/,cublas.o gemm.o)
RT_BLASLT_OBJECTS := $(addprefix $(RT_OUT)/,cublaslt.o gemm.o)
RT_LIBS := $(addprefix $(BUILD)/,libcudart.so.13 libcuda.so.1 libcublas.so.13 libcublasLt.so.13)

.PHONY: runtime
runtime: $(RT_LIBS)

$(RT_OUT)/%.o: $(RT)/%.cpp
	@mkdir -p $(@D)
	$(CXX) $(RT_CXXFLAGS) -MMD -MP -c $< -o $@
-include $(wildcard $(RT_OUT)/*.d)

# Every function of the real library that is not implemented here fails, and says so where CUDASIM_LOG=1.
$(RT_OUT)/%_stubs.cpp: $(RT)/%_symbols.txt
	@mkdir -p $(@D)
	{ echo '#include "stub.h"'; sed '/_ptsz$$\|_ptds$$/d; s/.*/CUDASIM_STUB(&)/' $<; } > $@
$(RT_OUT)/%_stubs.o: $(RT_OUT)/%_stubs.cpp $(RT)/stub.h
	$(CXX) $(RT_CXXFLAGS) -DCUDASIM_STUB_STATUS=$(if $(filter cudart,$*),801,15) -I$(RT) -c $< -o $@
$(RT_OUT)/%.map:
	@mkdir -p $(@D)
	printf '%s { global: cuda*; __cuda*; cublas*; cu[A-Z]*; cudasim_*; local: *; };\n' $* > $@

# The variants for a default stream per thread are the same functions.
$(RT_OUT)/ptsz.args: $(RT)/cudart_symbols.txt
	@mkdir -p $(@D)
	sed -n 's/^\(.*\)\(_ptsz\|_ptds\)$$/-Wl,--defsym=\1\2=\1/p' $< > $@

$(BUILD)/libcudart.so.13: $(RT_CUDART_OBJECTS) $(RT_OUT)/cudart_stubs.o $(RT_CORE) $(RT_OUT)/libcudart.so.13.map $(RT_OUT)/ptsz.args
	$(CXX) -o $@ $(RT_CUDART_OBJECTS) $(RT_OUT)/cudart_stubs.o $(RT_CORE) @$(RT_OUT)/ptsz.args \
	  -Wl,-soname,$(@F) -Wl,--version-script=$(RT_OUT)/$(@F).map $(RT_LDFLAGS)
$(BUILD)/libcublas.so.13: $(RT_BLAS_OBJECTS) $(RT_OUT)/cublas_stubs.o $(RT_OUT)/libcublas.so.13.map $(BUILD)/libcudart.so.13
	$(CXX) -o $@ $(RT_BLAS_OBJECTS) $(RT_OUT)/cublas_stubs.o $(BUILD)/libcudart.so.13 -Wl,-soname,$(@F) -Wl,--version-script=$(RT_OUT)/$(@F).map $(RT_LDFLAGS)
$(BUILD)/libcublasLt.so.13: $(RT_BLASLT_OBJECTS) $(RT_OUT)/cublasLt_stubs.o $(RT_OUT)/libcublasLt.so.13.map $(BUILD)/libcudart.so.13
	$(CXX) -o $@ $(RT_BLASLT_OBJECTS) $(RT_OUT)/cublasLt_stubs.o $(BUILD)/libcudart.so.13 -Wl,-soname,$(@F) -Wl,--version-script=$(RT_OUT)/$(@F).map $(RT_LDFLAGS)
# The driver functions live in libcudart.so.13: this only gives them the name that programs link against.
$(BUILD)/libcuda.so.1: $(BUILD)/libcudart.so.13
	$(CXX) -shared -o $@ -Wl,-soname,$(@F) -Wl,--no-as-needed $< -nostdlib

# For one PyTorch: TORCH is its folder, TORCH_VERSION its version.
.PHONY: torch-library
torch-library: $(BUILD)/libcudasim_torch-$(TORCH_VERSION).so
RT_TORCH_OUT := $(RT_OUT)/torch-$(TORCH_VERSION)
RT_TORCH_OBJECTS := $(patsubst $(RT)/torch/%.cpp,$(RT_TORCH_OUT)/%.o,$(wildcard $(RT)/torch/*.cpp))
$(RT_TORCH_OUT)/%.o: $(RT)/torch/%.cpp $(RT)/torch/capture.h
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -fPIC -isystem $(TORCH)/include -isystem $(CUDA_HOME)/include -c $< -o $@
# The functions of libcudart that it calls are already in the process.
$(BUILD)/libcudasim_torch-$(TORCH_VERSION).so: $(RT_TORCH_OBJECTS)
	$(CXX) -shared $^ -o $@ -L$(TORCH)/lib -ltorch_cuda -ltorch_cpu -lc10_cuda -lc10
