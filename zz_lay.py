import tempfile, pathlib, sys
from tests.distributed.test_layouts import *
from tests.distributed.test_traffic import BERT as B2, LOWER, POSITIONS_FROZEN, fetching, case, compare as cmp, check as chk
if __name__=="__main__":
    folder=pathlib.Path(tempfile.mkdtemp())
    one=train(folder,[prepared({"of":"bert"},6)],1)[0]
    cases=[{"tensor":2},{"tensor":2,"sequence_parallel":False,"recompute":"full"},{"pipeline":2,"accumulation":2},{"pipeline":2,"pipeline_schedule":"dualpipev","accumulation":4},{"stage":3},{"stage":3,"recompute":"selective","accumulation":2},{"expert":2,"accumulation":2}]
    cases=[{**c,"of":"bert"} for c in cases]
    rows=train(pathlib.Path(tempfile.mkdtemp()),[prepared(c,6) for c in cases],2)
    for c,r in zip(cases,rows):
        try: check(c,r,one); print("ok",c,flush=True)
        except AssertionError as e: print("BAD",c,str(e)[:300],flush=True)
    tc=[*(case("data", zero_stage=3, freeze=f, recompute=a, deepspeed=fetching(*o), model=B2) for f,a,o in (((),"none",(0,0,0)),((),"full",(500,3000,2000)),(LOWER,"none",(100,0,1500)),(POSITIONS_FROZEN,"full",(0,0,0)),(LOWER,"full",(500,3000,2000)))),
      case("tensor", tensor=2, micro=4, model=B2), *(case("pipeline", pipeline=2, model={**B2, "tie_embeddings": t}) for t in (True, False))]
    for c,f in zip(tc,cmp(pathlib.Path(tempfile.mkdtemp()),tc,2)):
        try: chk(c,f); print("ok",{k:v for k,v in c.items() if k!="model"},flush=True)
        except AssertionError as e: print("BAD",c,str(e)[:600],flush=True)
