import sys, time, os, json
from jax_causal import environment
environment.apply(devices=2, reserve=False)
import jax, statistics, dataclasses
import numpy as np
from jax_causal import bench, bench_profile, config
from jax_causal.pipeline import Pipeline
from jax_causal.parallel import SingleDevice
from sharding.sequence_parallel import SequenceParallel
c=dataclasses.replace(config.PRESETS[os.environ.get("PRE","wan-1.3b")],text_encoder=None,tokenizer=None)
t0=time.time(); out={}
def say(*a): print(*a,f"[{time.time()-t0:.0f} s]",flush=True)
benches={}
def make(name):
    p=SingleDevice() if name=="single" else SequenceParallel(2,"gather",**({} if name=="gather" else {"direct":False}))
    benches[name]=bench._Bench(Pipeline.random(c,dtype="bfloat16",parallel=p),c.num_frames,None,None,5,0)
def roll(name):
    r=benches[name]._roller(); full,without=zip(*(r() for _ in range(5)))
    say(name,"rollout",[round(x,4) for x in full],"without last",round(statistics.median(without),4)); out[name,"rollout"]=statistics.median(full)
    if jax.default_backend()=="cpu": return
    ks=bench_profile.gpu_kernels(bench_profile._profile(r))
    for k in ks: say("  collectives, exposed of a pass (us)",[round(x/35*1e6) for x in bench_profile.exposed(k)])
    parts,names=bench_profile.add_up(ks[0]); say("  ",{k:round(v,4) for k,v in parts.items()})
    counts={}
    for n,s,d in ks[0]: counts.setdefault(n,[]).append(d*1e6)
    for n,v in sorted(counts.items(),key=lambda kv:-sum(kv[1]))[:14]: print(f"      {n[:70]:70} x{len(v):5} median {statistics.median(v):8.1f} sum {sum(v)/1e3:8.1f} ms",flush=True)
def e2e(name):
    b=benches[name]; b._generate()
    runs=[b._generate() for _ in range(5)]
    say(name,"end_to_end",[round(x,4) for x,_ in runs],"first frame",[round(y,4) for _,y in runs])
for step in sys.argv[1:]:
    what,name=step.split(":")
    if name not in benches: make(name)
    {"roll":roll,"e2e":e2e}[what](name)
