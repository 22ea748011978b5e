import sys, itertools, dataclasses, json
sys.path[:0]=['examples','.']
import torch
from benchmarks import tiles as T
from benchmarks.timing import Device
from benchmarks.cases import SUITE
from lora_fx.passes.kernels.tile_program import Tile
d=Device('cuda'); rate=T.copy_rate(d)
ks=T.kernels_of(SUITE['m8192'][0],d)
def grid(k):
    names=[s[0] for s in k.program.body]; n=k.program.columns
    out=[]
    if 'across' in names:
        if 'product' in names:
            for rows,cols,step,stages,warps in itertools.product((512,1024,2048),(64,128),(16,32,64),(2,3,4),(4,8)): out.append(dict(rows=rows,columns=cols,step=step,walk='rows',stages=stages,warps=warps))
        elif 'down' in names:
            for rows,cols,step,strips,stages,warps in itertools.product((256,512,1024),(256,512),(32,64),(2,4),(1,2,3),(4,8)): out.append(dict(rows=rows,columns=cols,step=step,walk='rows',strips=strips,stages=stages,warps=warps))
        else:
            for rows,cols,step,stages,warps in itertools.product((512,1024,2048),(64,128,256),(32,64),(3,4),(4,)): out.append(dict(rows=rows,columns=cols,step=step,walk='rows',stages=stages,warps=warps))
    elif 'down' in names:
        for rows,cols,step,stages,warps in itertools.product((32,64),(1024,2048,4096,n),(64,128),(2,3,4,5),(4,8)): out.append(dict(rows=rows,columns=cols,step=step,walk='columns',stages=stages,warps=warps))
    else:
        for rows,cols,stages,warps in itertools.product((16,32,64,128),(64,128,256),(2,3),(4,)): out.append(dict(rows=rows,columns=cols,step=rows,walk='rows',stages=stages,warps=warps)); 
        for cols in (128,256): out.append(dict(rows=128,columns=cols,step=32,walk='rows',stages=3,warps=4))
    r=[]
    for o in out:
        try: t=Tile(**o)
        except ValueError: continue
        if t not in r: r.append(t)
    return r
import triton.testing as tt
seen=set(); res=[]
import time
t0=time.time()
order=sorted(ks,key=lambda k:-k.program.columns*len(k.program.body))
for k in order:
    nm=T.name_of(k.program)
    if time.time()-t0>float(sys.argv[1]): print('SKIP',nm); continue
    T.measure(k,[k.program.tile]+[t for t in grid(k) if t!=k.program.tile],d)
    best=sorted(k.times.items(),key=lambda x:x[1])[:6]
    print(nm,'calls',k.calls,'copy %.1f'%(k.copy/rate),'chosen %.1f'%k.times[k.program.tile],T.shown(k.program.tile),'tried',len(k.times))
    for t,v in best: print('    %.1f'%v,T.shown(t))
    if 'down' in nm and 'across' not in nm:
        one=sorted([(v,T.shown(t)) for t,v in k.times.items() if t.columns>=k.program.columns])[:3]; print('   one part',one)
    sys.stdout.flush()
