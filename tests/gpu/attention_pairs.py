"""paired timing of attention kernels in one process"""
import sys, time, types, statistics, pathlib, threading, subprocess, os
from concurrent.futures import ThreadPoolExecutor
T0=time.time(); LIMIT=float(sys.argv[1])
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax_causal import attention as attn
root=pathlib.Path(sys.argv[2]); old=pathlib.Path(sys.argv[3])
def module(name, path, edits=(), **given):
    s=path.read_text()
    for a,b in edits:
        assert a in s, a
        s=s.replace(a,b)
    m=types.ModuleType(name); m.__dict__.update(given); sys.modules[name]=m
    exec(compile(s,str(path),'exec'),m.__dict__); return m
V={}
from jax_causal import attention_hopper as new
V['new']=new
tile=module('tile_noskip', root/'jax_causal/attention_tile.py', [("out_acc[...] = _rescaled(out, shrink)","out_acc[...] = out * _over(shrink, out.shape)")])
V['noskip']=module('hop_noskip', root/'jax_causal/attention_hopper.py', [("from jax_causal import attention_tile\n","import tile_noskip as attention_tile\n"),("from jax_causal.attention_tile import","from tile_noskip import")])
module('plan_old', old/'jax_causal/attention_plan.py')
V['old']=module('hop_old', old/'jax_causal/attention_hopper.py', [("from jax_causal.attention_plan import","from plan_old import")])
R=4680
CASES={"text":(R,512,512,20),"b1":(R,7*R,R,8),"b4":(R,7*R,4*R,4),"b7":(R,7*R,7*R,3),"half b1":(2352,7*R,R,10),"half b4":(2352,7*R,4*R,6),"half b7":(2352,7*R,7*R,4)}
how={"no_keys":attn.NO_KEYS,"merge":attn.merge,"processors":132}
def chain(m,calls):
    def run(q,sets,length):
        outs=[]
        for i in range(calls):
            if outs: q,outs[-1]=lax.optimization_barrier((q,outs[-1]))
            outs.append(m.attend(q,*sets[i%2],length,**how)[0])
        return outs
    return jax.jit(run)
data={}
for c,(rows,keys,valid,calls) in CASES.items():
    ks=jax.random.split(jax.random.key(0,impl="rbg"),5)
    q=jax.random.normal(ks[0],(1,rows,12,128),jnp.bfloat16)
    kv=[jax.random.normal(k,(1,keys,12,128),jnp.bfloat16) for k in ks[1:]]
    data[c]=(q,((kv[0],kv[1]),(kv[2],kv[3])),jnp.int32(valid))
def comp(t):
    v,c=t
    try: return t, chain(V[v],CASES[c][3]).lower(*data[c]).compile()
    except Exception as e: print('FAILED',t,str(e)[-300:]); return t,None
jobs=[(v,c) for c in CASES for v in V]
with ThreadPoolExecutor(8) as ex: fn={t:f for t,f in ex.map(comp,jobs) if f}
print('compiled at %.0f s'%(time.time()-T0),flush=True)
ref={}
for c in CASES:
    q,sets,n=data[c]
    with jax.default_matmul_precision("highest"):
        e=attn.attention(q[:,::37].astype(jnp.float32),*(x.astype(jnp.float32) for x in sets[0]),length=n,backend="xla")
    for v in V:
        if (v,c) in fn:
            o=fn[v,c](*data[c]); err=float(jnp.linalg.norm(o[0][:,::37].astype(jnp.float32)-e)/jnp.linalg.norm(e)); same=all(bool((a==b).all()) for a,b in zip(o[::2],o[2::2]))
            if not err<5e-3 or not same: print('WRONG',v,c,err,same)
            ref[v,c]=err
    del e,o
print('checked at %.0f s'%(time.time()-T0),flush=True)
clk=[]
def watch():
    p=subprocess.Popen(["nvidia-smi","-i",os.environ.get("CUDA_VISIBLE_DEVICES","0"),"--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active","--format=csv,noheader,nounits","-lms","100"],stdout=subprocess.PIPE,text=True)
    for l in p.stdout:
        clk.append((time.time(),l.strip()))
        if time.time()-T0>LIMIT-1: break
    p.kill()
threading.Thread(target=watch,daemon=True).start()
times={t:[] for t in fn}
while time.time()-T0<LIMIT-6:
    for c in CASES:
        for v in V:
            f=fn[v,c]; calls=CASES[c][3]
            jax.block_until_ready(f(*data[c]))
            n=max(1,round(0.06/(times[v,c][-1]*calls*1e-6))) if times[v,c] else 5
            b=time.perf_counter()
            jax.block_until_ready([f(*data[c]) for _ in range(n)])
            times[v,c].append((time.perf_counter()-b)/n/calls*1e6)
for c in CASES:
    print(f"{c:8}"+"".join(f"  {v} {statistics.median(times[v,c][1:]):7.1f} ({min(times[v,c]):.1f}) x{statistics.median([a/b for a,b in zip(times[v,c],times['old',c])][1:]):.3f}" for v in V)+f"  n {len(times['new',c])} err {ref['new',c]:.2e} {ref['old',c]:.2e}",flush=True)
s=[x for t,x in clk]
print('clocks', s[::max(1,len(s)//12)])
