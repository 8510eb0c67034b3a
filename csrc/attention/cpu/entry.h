// The table of attention kernels of this ISA. Its functions choose the template for the run-time dtype.
#pragma once

#include "attention/cpu/backward.h"
#include "attention/cpu/forward.h"
#include "attention/cpu/map.h"
#include "attention/cpu/table.h"

DLK_ISA_BEGIN

// Runs carve() twice: the first pass adds up the sizes, the second gets the addresses.
template <class Work>
DLK_INLINE void carve_all(Work& work, Scratch& scratch) {
  work.carve(scratch);
  scratch.allocate();
  work.carve(scratch);
}

template <class C>
DLK_NOINLINE int attention_forward_as(const AttentionForwardParams& params, const AttentionPlan& plan,
                                      const Runtime& runtime) {
  const AttentionTasks tasks = AttentionTasks::of_rows(params.in, plan);
  Scratch scratch;
  AttentionForward<C> work(params, plan, tasks);
  carve_all(work, scratch);
  work.begin();
  auto body = [&](int worker, int64_t task) { work.run(worker, task); };
  return run_tasks<Bf16Unit::Session>(runtime, plan.threads, static_cast<int64_t>(tasks.tasks.size()), body);
}

template <class C>
DLK_NOINLINE int attention_backward_as(const AttentionBackwardParams& params, const AttentionPlan& plan,
                                       const Runtime& runtime) {
  const AttentionTasks tasks = AttentionTasks::of_keys(params.in, params.dmask.data != nullptr);
  Scratch scratch;
  AttentionBackward<C> work(params, plan, tasks);
  carve_all(work, scratch);
  work.begin();
  auto prepare = [&](int worker, int64_t head) { work.prepare(worker, head); };
  if (work.prepares())
    run_tasks<Bf16Unit::Session>(runtime, plan.threads, params.in.shape.B * params.in.shape.Hkv, prepare);
  auto body = [&](int worker, int64_t task) { work.run(worker, task); };
  const int members = run_tasks<Bf16Unit::Session>(runtime, plan.threads, work.task_count(), body);
  work.finish();
  return members;
}

template <class C>
DLK_NOINLINE int attention_map_as(const AttentionMapParams& params, const AttentionPlan& plan, const Runtime& runtime) {
  Scratch scratch;
  AttentionMap<C> work(params, plan);
  carve_all(work, scratch);
  auto body = [&](int worker, int64_t task) { work.run(worker, task); };
  return run_tasks<Bf16Unit::Session>(runtime, plan.threads, work.task_count(), body);
}

inline int attention_forward_entry(const AttentionForwardParams& params, const AttentionPlan& plan,
                                   const Runtime& runtime) {
  return with_compute_type(params.in.shape.dtype,
                           [&](auto zero) { return attention_forward_as<decltype(zero)>(params, plan, runtime); });
}

inline int attention_backward_entry(const AttentionBackwardParams& params, const AttentionPlan& plan,
                                    const Runtime& runtime) {
  return with_compute_type(params.in.shape.dtype,
                           [&](auto zero) { return attention_backward_as<decltype(zero)>(params, plan, runtime); });
}

inline int attention_map_entry(const AttentionMapParams& params, const AttentionPlan& plan, const Runtime& runtime) {
  return with_compute_type(params.in.shape.dtype,
                           [&](auto zero) { return attention_map_as<decltype(zero)>(params, plan, runtime); });
}

constexpr AttentionTable kAttention = {kIsa, attention_forward_entry, attention_backward_entry, attention_map_entry};

DLK_ISA_END
