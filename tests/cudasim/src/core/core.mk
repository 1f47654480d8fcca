# The interpreter, $(BUILD)/libcudasim_core.a, and its tests.
CORE_OUT := $(BUILD)/core
CORE_TEST := $(BUILD)/tests
# Floating point must not be contracted: the handlers say where a fused multiply-add is meant.
CORE_CXXFLAGS := -std=c++20 -fPIC -O3 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -mlzcnt -ffp-contract=off \
  -fno-math-errno -Wall -Iinclude -pthread
CORE_OBJECTS := $(patsubst src/core/%.cpp,$(CORE_OUT)/%.o,$(wildcard src/core/*.cpp))

.PHONY: core test-core
core: $(BUILD)/libcudasim_core.a

$(CORE_OUT)/%.o: src/core/%.cpp
	@mkdir -p $(@D)
	$(CXX) $(CORE_CXXFLAGS) -MMD -MP -c $< -o $@
-include $(wildcard $(CORE_OUT)/*.d)

$(BUILD)/libcudasim_core.a: $(CORE_OBJECTS)
	rm -f $@
	ar rcs $@ $^

# tests/core/<name>.cu -> $(CORE_TEST)/<name>.{80,80g,90a}.ptx; *_sm90.cu only for 90a, and *_sm100.cu only for 100a
CORE_KERNELS100 := $(wildcard tests/core/*_sm100.cu)
CORE_KERNELS := $(filter-out $(CORE_KERNELS100),$(wildcard tests/core/*.cu))
CORE_KERNELS80 := $(filter-out %_sm90.cu,$(CORE_KERNELS))
CORE_PTX := $(patsubst tests/core/%.cu,$(CORE_TEST)/%.80.ptx,$(CORE_KERNELS80)) \
  $(patsubst tests/core/%.cu,$(CORE_TEST)/%.80g.ptx,$(CORE_KERNELS80)) \
  $(patsubst tests/core/%.cu,$(CORE_TEST)/%.90a.ptx,$(CORE_KERNELS)) \
  $(patsubst tests/core/%.cu,$(CORE_TEST)/%.100a.ptx,$(CORE_KERNELS100))
CORE_DEVICE_HEADERS := tests/core/mbarrier.cuh tests/core/blackwell_sm100.h
CORE_NVCC := $(NVCC) -ptx -std=c++17 -diag-suppress 20054

$(CORE_TEST)/%.80.ptx: tests/core/%.cu
	@mkdir -p $(@D)
	$(CORE_NVCC) -arch=compute_80 $< -o $@
$(CORE_TEST)/%.80g.ptx: tests/core/%.cu
	@mkdir -p $(@D)
	$(CORE_NVCC) -G -arch=compute_80 $< -o $@
$(CORE_TEST)/%.90a.ptx: tests/core/%.cu $(CORE_DEVICE_HEADERS)
	@mkdir -p $(@D)
	$(CORE_NVCC) -arch=compute_90a $< -o $@
$(CORE_TEST)/%.100a.ptx: tests/core/%.cu $(CORE_DEVICE_HEADERS)
	@mkdir -p $(@D)
	$(CORE_NVCC) -arch=compute_100a $< -o $@

$(CORE_TEST)/test_core: $(wildcard tests/core/*.cpp tests/core/*.h) $(BUILD)/libcudasim_core.a
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O2 -mavx2 -mfma -mf16c -ffp-contract=off -Wall -Iinclude -pthread $(filter %.cpp,$^) $(BUILD)/libcudasim_core.a -o $@

test-core: core $(CORE_TEST)/test_core $(CORE_PTX)
	$(CORE_TEST)/test_core $(CORE_TEST)
