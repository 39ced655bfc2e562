import os, sys, time
from jax_causal import environment
environment.apply(devices=2)
import jax, jax.numpy as jnp, numpy as np, statistics
from jax import lax
from jax.sharding import PartitionSpec as P, Mesh, AxisType, NamedSharding
from jax_causal import attention_peers
from jax_causal.attention import attention
from jax_causal.fused_rotation import Peers
mesh=Mesh(np.array(jax.devices()).reshape(1,2,1),("data","seq","heads"),axis_types=(AxisType.Auto,)*3)
F,S,m,N,D,K=3,1560,784,12,128,32760
if sys.argv[2]=="nowait":
    attention_peers.pl.semaphore_wait=lambda *a,**k: None
peers=Peers(2,S,"seq",True); bf=jnp.bfloat16; tok=P(None,None,"seq")
first=int(sys.argv[1]); overlap=sys.argv[2]=="overlap"
slots=np.arange(first,first+3); length=(first+3)*S
rng=np.random.default_rng(0)
q=rng.standard_normal((1,F,2*m,N,D),np.float32); kv=[rng.standard_normal((1,1,K,N,D),np.float32) for _ in "kv"]
def caches(x):
    out=[]
    for d in range(2):
        y=np.array(x)
        for s in slots:
            own=np.zeros(S,bool); own[d*m:min((d+1)*m,S)]=True
            y[:,:,s*S:(s+1)*S][:,:,~own]=0
        out.append(jax.device_put(jnp.asarray(y,bf),jax.devices()[d]))
    return jax.make_array_from_single_device_arrays(x.shape,NamedSharding(mesh,P()),out)
def body(q,k,v):
    return attention_peers.attend(q,k,v,jnp.asarray(slots,jnp.int32),jnp.int32(length),peers=peers,fresh=jnp.int32(first*S) if overlap else None)
f=jax.jit(jax.shard_map(body,mesh=mesh,in_specs=(tok,P(),P()),out_specs=(tok,P(),P()),check_vma=False),donate_argnums=(1,2))
qd=jax.device_put(jnp.asarray(q,bf),NamedSharding(mesh,tok)); c=[caches(x) for x in kv]
t=time.time(); out,k,v=jax.block_until_ready(f(qd,*c)); print("first call",round(time.time()-t,1),flush=True)
want=attention(jax.device_put(jnp.asarray(q,bf),jax.devices()[0]).reshape(1,-1,N,D),*(jax.device_put(jnp.asarray(x,bf),jax.devices()[0]) for x in kv),length=length)
a,b=np.asarray(out,np.float32).reshape(1,-1,N,D),np.asarray(want,np.float32)
print("error",np.linalg.norm(a-b)/np.linalg.norm(b))
for name,x,y in zip("kv",(k,v),kv):
    for s in x.addressable_shards: print(name,s.device.id,np.abs(np.asarray(s.data[:,:,:length],np.float32)-np.asarray(jnp.asarray(y[:,:,:length],bf),np.float32)).max())
def loop(q,k,v):
    def step(i,c):
        q,k,v=c; o,k,v=body(q,k,v); return q+o*bf(1e-3),k,v
    return lax.fori_loop(0,30,step,(q,k,v))
g=jax.jit(jax.shard_map(loop,mesh=mesh,in_specs=(tok,P(),P()),out_specs=(tok,P(),P()),check_vma=False),donate_argnums=(0,1,2))
ts=[]
for i in range(5):
    t=time.perf_counter(); qd,k,v=jax.block_until_ready(g(qd,k,v)); ts.append((time.perf_counter()-t)/30*1e6)
print(first,sys.argv[2],"us a call",[round(x,1) for x in ts],flush=True)
