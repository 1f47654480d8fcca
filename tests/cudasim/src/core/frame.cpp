// Frames of function calls, and the special registers in them.
#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "machine.h"

namespace cudasim {

Frame::~Frame() {
  free(regs);
  free(pmem);
}

Frame* new_frame(Frame* parent, const Function* fn) {
  auto* f = new Frame;
  f->parent = parent;
  f->fn = fn;
  f->depth = parent ? parent->depth + 1 : 0;
  f->local_base = parent ? parent->local_base + parent->fn->local_bytes : kLocalBase;
  f->regs = static_cast<uint8_t*>(aligned_alloc(64, fn->frame_bytes + 64));
  // unwritten registers read as junk
  auto* words = reinterpret_cast<uint32_t*>(f->regs);
  for (uint32_t i = 0; i < fn->frame_bytes / 4; ++i) words[i] = 0x7fbadbadu;
  if (fn->param_bytes) f->pmem = static_cast<uint8_t*>(calloc(32, fn->param_bytes));
  for (auto& c : fn->consts) {
    uint8_t* at = f->regs + c.offset;
    switch (c.size) {
      case 0:
        *reinterpret_cast<uint32_t*>(at) = uint32_t(c.value);
        break;
      case 2:
        std::fill_n(reinterpret_cast<uint16_t*>(at), 32, uint16_t(c.value));
        break;
      case 4:
        std::fill_n(reinterpret_cast<uint32_t*>(at), 32, uint32_t(c.value));
        break;
      case 16:
        for (int i = 0; i < 32; ++i) {
          reinterpret_cast<uint64_t*>(at)[2 * i] = c.value;
          reinterpret_cast<uint64_t*>(at)[2 * i + 1] = int64_t(c.value) < 0 ? ~0ull : 0;
        }
        break;
      default:
        std::fill_n(reinterpret_cast<uint64_t*>(at), 32, c.value);
        break;
    }
  }
  return f;
}

static uint64_t now_ns() {
  return uint64_t(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

// Fills the special registers that a function uses. They depend on CTA, warp and frame.
void Warp::refresh(Frame* f) {
  f->serial = blk->group->serial;
  const LaunchState& ls = *blk->ls;
  const Dim3& nb = ls.block;
  for (auto& s : f->fn->specials) {
    uint64_t v[32];
    auto all = [&](uint64_t x) {
      for (auto& e : v) e = x;
    };
    auto per_lane = [&](auto g) {
      for (uint32_t l = 0; l < 32; ++l) v[l] = g(l);
    };
    uint32_t t0 = index * 32;
    uint32_t cl[3] = {ls.cluster.x, ls.cluster.y, ls.cluster.z};
    using S = Special;
    switch (s.id) {
      case S::tid_x:
        per_lane([&](uint32_t l) { return (t0 + l) % nb.x; });
        break;
      case S::tid_y:
        per_lane([&](uint32_t l) { return (t0 + l) / nb.x % nb.y; });
        break;
      case S::tid_z:
        per_lane([&](uint32_t l) { return (t0 + l) / nb.x / nb.y; });
        break;
      case S::ntid_x:
        all(nb.x);
        break;
      case S::ntid_y:
        all(nb.y);
        break;
      case S::ntid_z:
        all(nb.z);
        break;
      case S::ctaid_x:
        all(blk->ctaid[0]);
        break;
      case S::ctaid_y:
        all(blk->ctaid[1]);
        break;
      case S::ctaid_z:
        all(blk->ctaid[2]);
        break;
      case S::nctaid_x:
        all(ls.grid.x);
        break;
      case S::nctaid_y:
        all(ls.grid.y);
        break;
      case S::nctaid_z:
        all(ls.grid.z);
        break;
      case S::laneid:
        per_lane([](uint32_t l) { return l; });
        break;
      case S::warpid:
        all(index);
        break;
      case S::nwarpid:
        all(blk->nwarps);
        break;
      case S::smid:
        all(blk->linear % 132);
        break;
      case S::nsmid:
        all(132);
        break;
      case S::lanemask_eq:
        per_lane([](uint32_t l) { return 1u << l; });
        break;
      case S::lanemask_lt:
        per_lane([](uint32_t l) { return (1u << l) - 1; });
        break;
      case S::lanemask_le:
        per_lane([](uint32_t l) { return (2u << l) - 1; });
        break;
      case S::lanemask_gt:
        per_lane([](uint32_t l) { return uint32_t(~((2u << l) - 1)); });
        break;
      case S::lanemask_ge:
        per_lane([](uint32_t l) { return uint32_t(~((1u << l) - 1)); });
        break;
      case S::dynamic_smem_size:
        all(ls.dynamic_shared);
        break;
      case S::total_smem_size:
      case S::aggr_smem_size:
        all(ls.shared_bytes);
        break;
      case S::clusterid_x:
        all(blk->ctaid[0] / cl[0]);
        break;
      case S::clusterid_y:
        all(blk->ctaid[1] / cl[1]);
        break;
      case S::clusterid_z:
        all(blk->ctaid[2] / cl[2]);
        break;
      case S::nclusterid_x:
        all(ls.grid.x / cl[0]);
        break;
      case S::nclusterid_y:
        all(ls.grid.y / cl[1]);
        break;
      case S::nclusterid_z:
        all(ls.grid.z / cl[2]);
        break;
      case S::cluster_ctaid_x:
        all(blk->ctaid[0] % cl[0]);
        break;
      case S::cluster_ctaid_y:
        all(blk->ctaid[1] % cl[1]);
        break;
      case S::cluster_ctaid_z:
        all(blk->ctaid[2] % cl[2]);
        break;
      case S::cluster_nctaid_x:
        all(cl[0]);
        break;
      case S::cluster_nctaid_y:
        all(cl[1]);
        break;
      case S::cluster_nctaid_z:
        all(cl[2]);
        break;
      case S::cluster_ctarank:
        all(blk->rank);
        break;
      case S::cluster_nctarank:
        all(ls.cluster_size);
        break;
      case S::is_explicit_cluster:
        all(ls.explicit_cluster ? FULL : 0);
        break;
      case S::clock:
      case S::clock_hi:
      case S::clock64:
        all(0);
        break;
      case S::globaltimer:
      case S::globaltimer_lo:
        all(now_ns());
        break;
      case S::globaltimer_hi:
        all(now_ns() >> 32);
        break;
      case S::grid_workspace_hi:
        all(uint64_t(ls.params.data() + ls.workspace) >> 32);
        break;
      case S::grid_workspace_lo:
        all(uint64_t(ls.params.data() + ls.workspace));
        break;
      case S::shared_base:
        all(blk->shared_window() + uint64_t(s.addend));
        break;
      case S::local_base:
        all(uint64_t(int64_t(f->local_base) + s.addend));
        break;
      case S::param_base:
        all(uint64_t(ls.params.data()) + uint64_t(s.addend));
        break;
      case S::pmem_base:
        per_lane([&](uint32_t l) { return uint64_t(f->pmem) + l * f->fn->param_bytes + uint64_t(s.addend); });
        break;
      default:
        all(0);
        break;
    }
    uint8_t* at = f->regs + s.offset;
    if (s.size == 0) *reinterpret_cast<uint32_t*>(at) = uint32_t(v[0]);
    for (int l = 0; l < 32; ++l) {
      if (s.size == 2)
        reinterpret_cast<uint16_t*>(at)[l] = uint16_t(v[l]);
      else if (s.size == 4)
        reinterpret_cast<uint32_t*>(at)[l] = uint32_t(v[l]);
      else if (s.size == 8)
        reinterpret_cast<uint64_t*>(at)[l] = v[l];
    }
  }
}

Frame* Warp::enter(Frame* parent, const Function* fn) {
  Frame* f = nullptr;
  for (auto& c : parent->children)
    if (c->fn == fn) {
      f = c.get();
      break;
    }
  if (!f) {
    f = new_frame(parent, fn);
    parent->children.emplace_back(f);
    if (f->depth > 4096) fault(Fault::internal, -1, "call stack overflow (depth 4096)");
  }
  if (f->serial != blk->group->serial) refresh(f);
  grow_local(f->local_base + fn->local_bytes);
  return f;
}

void Warp::grow_local(uint32_t bytes) {
  if (bytes <= local_stride) return;
  uint32_t stride = std::max(bytes, local_stride * 2);
  stride = (stride + 255) / 256 * 256;
  std::vector<uint8_t> n(size_t(stride) * 32, 0xff);
  for (int l = 0; l < 32 && local_stride; ++l)
    memcpy(&n[size_t(l) * stride], &local[size_t(l) * local_stride], local_stride);
  local.swap(n);
  local_stride = stride;
}

}  // namespace cudasim
