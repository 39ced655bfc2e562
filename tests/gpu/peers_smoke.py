import dataclasses, sys, os, faulthandler
faulthandler.dump_traceback_later(int(os.environ.get("STACKS","60")), exit=True)
from jax_causal import environment
environment.apply(devices=2, reserve=False)
import jax, time, numpy as np
from jax_causal import config, Pipeline
from jax_causal.parallel import SingleDevice
from sharding import SequenceParallel
from tests.gpu import model_smoke
c=config.PRESETS[os.environ.get("PRE","wan-1.3b")]
c=dataclasses.replace(c,text_encoder=None,tokenizer=None,transformer=dataclasses.replace(c.transformer,num_layers=2))
t=time.time()
one=Pipeline.random(c,dtype="bfloat16",parallel=SingleDevice())
single=model_smoke._latents(one,one.parallel); print("single",time.time()-t,flush=True)
two=Pipeline.random(c,dtype="bfloat16",parallel=SequenceParallel(2,"gather")); ok=True
print(two.parallel, flush=True)
for i in range(3):
    ours=model_smoke._latents(two,two.parallel)
    for b in range(3): print(i,"block",b,np.linalg.norm(ours[:,3*b:3*b+3]-single[:,3*b:3*b+3])/np.linalg.norm(single[:,3*b:3*b+3]),np.isfinite(ours).all(),round(time.time()-t,1),flush=True)
    ok&=bool(np.linalg.norm(ours-single)/np.linalg.norm(single)<0.02)
sys.exit(0 if ok else 1)
