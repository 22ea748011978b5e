import sys,time
sys.path[:0]=['examples','.']
import torch
from benchmarks.cases import SUITE
from benchmarks.forms import Block, build_form, random_adapters, FROZEN, OURS, PLAIN
from benchmarks.runner import inputs
from benchmarks.timing import Device
d=Device('cuda'); case=SUITE['m8192'][0]
torch.manual_seed(0)
with torch.device('cuda'): base=Block(case)
ad=random_adapters(base,case.rank,seed=1)
x,up=inputs(case,d,seed=2)
for name in (FROZEN,PLAIN,OURS):
    f=build_form(name,base,rank=case.rank,adapters=None if name==FROZEN else ad)
    step=f.stepper(x,up)
    for _ in range(5): step()
    torch.cuda.synchronize()
    hs=[]
    for _ in range(10):
        torch.cuda.synchronize(); t=time.perf_counter(); step(); hs.append(time.perf_counter()-t)
    torch.cuda.synchronize()
    print(name,'host ms/step %.2f'%(1e3*sorted(hs)[5]))
    if name==OURS:
        import cProfile,pstats
        torch.cuda.synchronize(); p=cProfile.Profile(); 
        p.enable(); 
        for _ in range(10): step()
        p.disable(); pstats.Stats(p).sort_stats('tottime').print_stats(18)
