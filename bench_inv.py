import sys, os, math, time, itertools, dataclasses, concurrent.futures, multiprocessing
import torch
OUT=os.environ.get('OUT','/tmp')
from deformnd.kernels.triton import hopper, configs, compiled, launch, layouts, kernels
from deformnd.kernels.triton.compiled import descriptor_type
from deformnd.kernels.geometry import Geometry
def geo(B,C,size,O,k,G=1,t=False,stride=1,pad=None,dil=1,psize=None):
    n=len(size); return Geometry(B,C,O,1,G,G,size,psize or size,(k,)*n,(stride,)*n,(k//2 if pad is None else pad,)*n,(dil,)*n)
S=dict(big=geo(8,256,(128,128),256,3),r50c3=geo(2,128,(100,168),128,3),r50c4=geo(2,256,(50,84),256,3),r50c5=geo(2,512,(25,42),512,3),
 b64=geo(16,64,(128,128),64,3),k7=geo(1,256,(64,64),256,7),conv3d=geo(1,64,(7,32,32),64,3),
 conv1d=geo(16,512,(128,),512,16,pad=22,dil=3),up2d=geo(4,128,(128,128),256,4,stride=2,pad=1,psize=(64,64)),
 bvsr=geo(1,64,(180,320),64,3,16),edvr=geo(4,128,(128,128),128,3,8))
conv1dP=127
S['conv1d']=S['conv1d']._replace(point_size=(conv1dP,))
R=configs.InverseRow
V={256:[R(256,2,2,3,192),R(256,3,1,3,192),R(256,2,1,3,192),R(256,2,2,2,200)],
   128:[R(128,2,2,3,168),R(128,3,2,3,168),R(128,2,1,2,168)],
   64:[R(64,2,2,3,152),R(64,3,3,3,152),R(64,2,1,2,152)]}
def variants(n):
    g=S[n]; c=math.gcd(256,g.image_channels)
    base=V[c]
    lists=[None]+([64] if n in('big','b64','up2d') else [])
    for i,r in enumerate(base):
        for l in (lists if i==0 else [None]): yield r,l
def make(n,row,listed,dt,last=False):
    configs.INVERSE=(row,); hopper.inverse_launch.cache_clear()
    m=hopper.inverse_launch(S[n],dt,last,132)
    if listed: m.launch.constants['LISTED']=listed; m.launch.tail=(*m.launch.integers,*m.launch.constants.values())
    return m
def build(job):
    from triton.backends.compiler import GPUTarget
    n,row,listed=job; dt=torch.float16
    try:
        m=make(n,row,listed,dt); i=torch.int32
        m.launch.compile([dt,descriptor_type(dt,m.block,m.layout),dt,dt,None,i,i,torch.float32 if m.launch.constants['SPLIT'] else dt],GPUTarget('cuda',90,32))
        return ''
    except Exception as e:
        return f'{n} {row} {listed} {repr(e)[:200]}'
def main():
    from triton.testing import do_bench
    names=sys.argv[1:] or list(S)
    log=open(f'{OUT}/bench.log','w')
    def say(*a):
        print(*a,flush=True); print(*a,file=log,flush=True)
    jobs=[(n,r,l) for n in names for r,l in variants(n)]
    t=time.time()
    with multiprocessing.get_context('spawn').Pool(14) as p: bad=[b for b in p.map(build,jobs,chunksize=1) if b]
    say('built',len(jobs),round(time.time()-t,1),bad)
    dt=torch.float16
    def b(f): return do_bench(f,warmup=2,rep=10,return_mode='median')*1e3
    for n in names:
      try:
        g=S[n]; torch.manual_seed(0)
        taps=math.prod(g.kernel); P=math.prod(g.point_size)
        points=torch.randn(g.batch,g.point_channels,*g.point_size,device='cuda',dtype=dt)
        w=torch.randn(g.point_channels,g.image_channels,*g.kernel,device='cuda',dtype=dt)/math.sqrt(g.point_channels*taps)
        off=(2*torch.randn(g.batch,g.offset_groups*taps*len(g.kernel),*g.point_size,device='cuda')).to(dt)
        mask=torch.rand(g.batch,g.mask_groups*taps,*g.point_size,device='cuda').to(dt)
        call=layouts.Call.of(g,points,off,mask,w)
        plan=launch._list_plan(g,True); count,starts,fill,order=plan.launches
        lists=torch.zeros(2*plan.slots+1,dtype=torch.int32,device='cuda'); entries=torch.empty(plan.entries,dtype=torch.int32,device='cuda')
        keep=lists.clone()
        def count_(): count(off,lists,None)
        count(off,lists,None); starts(lists); 
        counts=lists[:plan.slots].clone(); ends=lists[plan.slots+1:].clone()
        def fill_(): fill(off,lists,entries)
        def reset(): lists[plan.slots+1:].copy_(ends)
        fill(off,lists,entries); torch.cuda.synchronize()
        s0=entries[:int(lists[plan.slots])].sum()
        tr=b(reset); tf=b(lambda:(reset(),fill_()))-tr
        reset(); fill_()
        to=b(lambda: order(off,lists,entries))
        good=lists.clone()
        tz=b(lambda: lists.zero_()); tc=b(lambda: (count_())); ts=b(lambda: starts(lists))
        lists.copy_(good)
        say(n,'count %.0f starts %.0f fill %.0f order %.0f zero %.0f'%(tc,ts,tf,to,tz),'mean list %.1f max %d'%(counts.float().mean(),counts.max()))
        rows=call.rows(points); packed=call.weight(); spreadw=call.spread_weight()
        launch._inverse_launch.cache_clear()
        L=launch._inverse_launch(g,2,'native',False,132); sp=L.grid[2]
        out=torch.full((g.batch,g.image_channels,*g.image_size),float('nan'),device='cuda',dtype=dt)
        tgt=out if sp==1 else torch.full((sp,out.numel()),float('nan'),device='cuda')
        def tri():
            L(rows,packed,off,mask,None,lists,entries,tgt); launch._sum_splits(tgt,out)
        tri(); ref=out.float().clone()
        say(n,'triton split',sp,'%.0f'%b(tri))
        for row,listed in variants(n):
            m=make(n,row,listed,dt); sp=m.launch.grid[2]
            out.fill_(float('nan')); tgt2=out if sp==1 else torch.full((sp,out.numel()),float('nan'),device='cuda')
            def f():
                r=m(rows,spreadw,off,mask,None,lists,entries,tgt2); launch._sum_splits(tgt2,out); return r
            ok=f(); torch.cuda.synchronize()
            e=((out.float()-ref).norm()/ref.norm()).item()
            first=out.clone(); f(); same=torch.equal(first,out)
            say(n,'gluon',(row.points,row.factors,row.weights,row.registers),'listed',m.launch.constants['LISTED'],'split',sp,ok,'err %.1e same %s'%(e,same),'%.0f'%b(f))
      except Exception as ex:
        say(n,'FAILED',repr(ex)[:500])
        if 'CUDA' in repr(ex) or 'illegal' in repr(ex): raise
if __name__=='__main__': main()
