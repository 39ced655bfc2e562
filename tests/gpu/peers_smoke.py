import dataclasses, sys
from jax_causal import environment
environment.apply(devices=2)
import jax, time, numpy as np
from jax_causal import config, Pipeline
from jax_causal.parallel import SingleDevice
from sharding import SequenceParallel
from tests.gpu import model_smoke
c=config.PRESETS["wan-1.3b"]
c=dataclasses.replace(c,text_encoder=None,tokenizer=None,transformer=dataclasses.replace(c.transformer,num_layers=2))
pipe=Pipeline.random(c,dtype="bfloat16")
t=time.time()
single=model_smoke._latents(pipe,SingleDevice()); print("single",time.time()-t,flush=True)
how=SequenceParallel(2,"gather"); ok=True
for i in range(3):
    ours=model_smoke._latents(pipe,how)
    for b in range(3): print(i,"block",b,np.linalg.norm(ours[:,3*b:3*b+3]-single[:,3*b:3*b+3])/np.linalg.norm(single[:,3*b:3*b+3]),np.isfinite(ours).all(),time.time()-t,flush=True)
    ok&=bool(model_smoke._compare("gather",ours,single)) and np.linalg.norm(ours-single)/np.linalg.norm(single)<0.02
sys.exit(0 if ok else 1)
